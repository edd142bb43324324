// RmsNorm, AddRmsNorm, SwiGlu and Int6Rows as onnxruntime sees them; `lowering/onnx/native.py` has their bodies.
// Included by library.cpp only.
#pragma once

#include "int6.h"
#include "layers.h"
#include "operator.h"

namespace {

const layers::Kernels* layers_kernels = nullptr;
constexpr int64_t kWorkPerNumber = 8;  // multiplications that a number read and written counts as

template <typename T>
T* result(const ort::Api* api, ort::KernelContext* context, std::size_t index, const std::vector<int64_t>& shape) {
    ort::Value* value = nullptr;
    check(ort::output(api, context, index, static_cast<const int64_t*>(shape.data()), shape.size(), &value));
    return data_of<T>(api, value);
}

int64_t rows_of(const Shape& shape) {
    int64_t rows = 1;
    for (std::size_t axis = 0; axis + 1 < shape.sizes.size(); axis++) rows *= shape.sizes[axis];
    return rows;
}

// RmsNorm(x [..., N], weight [N]) -> y; AddRmsNorm(x, residual, weight) -> (y, x + residual)
template <bool Residual>
struct RmsNorm {
    static constexpr const char* kName = Residual ? "AddRmsNorm" : "RmsNorm";

    const ort::Api* api;
    const layers::Kernels& kernels = *layers_kernels;
    float epsilon;

    RmsNorm(const ort::Api* api, const ort::KernelInfo* info) : api(api) {
        check(ort::float_attribute(api, info, "epsilon", &epsilon));
    }

    void compute(ort::KernelContext* context) const {
        const ort::Value* x = input_value(api, context, 0);
        const ort::Value* weight = input_value(api, context, Residual ? 2 : 1);
        const Shape shape = shape_of(api, x), scales = shape_of(api, weight);
        if (shape.sizes.empty() || scales.sizes != std::vector<int64_t>{shape.sizes.back()})
            fail(api, "lincompile.%s: weight must be as long as x's last axis, got %s for %s", kName,
                 scales.text().c_str(), shape.text().c_str());
        layers::Norm call{};
        call.x = data_of<const float>(api, x);
        call.weight = data_of<const float>(api, weight);
        call.width = shape.sizes.back();
        call.epsilon = epsilon;
        call.y = result<float>(api, context, 0, shape.sizes);
        if (Residual) {
            const ort::Value* residual = input_value(api, context, 1);
            const Shape other = shape_of(api, residual);
            if (other.sizes != shape.sizes)
                fail(api, "lincompile.%s: residual must be %s, got %s", kName, shape.text().c_str(),
                     other.text().c_str());
            call.residual = data_of<const float>(api, residual);
            call.sum = result<float>(api, context, 1, shape.sizes);
        }
        const int64_t rows = rows_of(shape);
        spread(api, context, rows, rows * call.width * kWorkPerNumber,
               [&](int64_t first, int64_t last) { kernels.norm(call, first, last); });
    }
};

// SwiGlu(x [..., 2N]) -> y [..., N]
struct SwiGlu {
    const ort::Api* api;
    const layers::Kernels& kernels = *layers_kernels;

    SwiGlu(const ort::Api* api, const ort::KernelInfo*) : api(api) {}

    void compute(ort::KernelContext* context) const {
        const ort::Value* x = input_value(api, context, 0);
        Shape shape = shape_of(api, x);
        if (shape.sizes.empty() || shape.sizes.back() % 2 != 0)
            fail(api, "lincompile.SwiGlu: x's last axis must be even, got %s", shape.text().c_str());
        const int64_t rows = rows_of(shape), width = shape.sizes.back() /= 2;
        const float* in = data_of<const float>(api, x);
        float* out = result<float>(api, context, 0, shape.sizes);
        spread(api, context, rows, rows * width * 2 * kWorkPerNumber,
               [&](int64_t first, int64_t last) { kernels.swiglu(in, out, width, first, last); });
    }
};

// Int6Rows(ids int64 [...], high [N, K/2], low [N, K/4], scale [N, ceil(K/128)]) -> y [..., K]
struct Int6Rows {
    const ort::Api* api;
    int64_t width;

    Int6Rows(const ort::Api* api, const ort::KernelInfo* info) : api(api) {
        check(ort::int_attribute(api, info, "K", &width));
        if (width < 4 || width % 4 != 0)
            fail(api, "lincompile.Int6Rows: K must be a positive multiple of 4, got %lld", static_cast<long long>(width));
    }

    template <typename T>
    const T* plane(ort::KernelContext* context, std::size_t index, const char* name, int64_t columns,
                   int64_t& rows) const {
        const ort::Value* value = input_value(api, context, index);
        const Shape shape = shape_of(api, value);
        if (shape.sizes.size() != 2 || shape.sizes[1] != columns || (index > 1 && shape.sizes[0] != rows))
            fail(api, "lincompile.Int6Rows: %s must have %lld columns for K = %lld and as many rows as high, got %s",
                 name, static_cast<long long>(columns), static_cast<long long>(width), shape.text().c_str());
        rows = shape.sizes[0];
        return data_of<const T>(api, value);
    }

    void compute(ort::KernelContext* context) const {
        const int64_t groups = (width + int6::kGroup - 1) / int6::kGroup;
        int64_t rows = 0;
        const uint8_t* high = plane<uint8_t>(context, 1, "high", width / 2, rows);
        const uint8_t* low = plane<uint8_t>(context, 2, "low", width / 4, rows);
        const uint16_t* scale = plane<uint16_t>(context, 3, "scale", groups, rows);
        const ort::Value* value = input_value(api, context, 0);
        Shape shape = shape_of(api, value);
        shape.sizes.push_back(width);
        const int64_t* ids = data_of<const int64_t>(api, value);
        float* y = result<float>(api, context, 0, shape.sizes);
        for (int64_t i = 0, count = rows_of(shape); i < count; i++, y += width) {
            const int64_t row = ids[i] < 0 ? ids[i] + rows : ids[i];
            if (row < 0 || row >= rows)
                fail(api, "lincompile.Int6Rows: id %lld is outside the table's %lld rows", static_cast<long long>(ids[i]),
                     static_cast<long long>(rows));
            const uint8_t *four = high + row * (width / 2), *two = low + row * (width / 4);
            for (int64_t k = 0; k < width; k++) {
                const int code = (four[k / 2] >> (k % 2 * 4) & 15) << 2 | (two[k / 4] >> (k % 4 * 2) & 3);
                y[k] = static_cast<float>(code - 32);
            }
            for (int64_t g = 0; g < groups; g++) {
                const float factor = int6::from_half(scale[row * groups + g]);
                for (int64_t k = g * int6::kGroup; k < std::min(width, (g + 1) * int6::kGroup); k++) y[k] *= factor;
            }
        }
    }
};

}  // namespace
