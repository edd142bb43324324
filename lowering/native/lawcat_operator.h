// LawcatWindow as onnxruntime sees it; `lowering/onnx/lawcat.py` has its inputs. Included by library.cpp only.
#pragma once

#include "lawcat.h"
#include "operator.h"

namespace {

const lawcat::Kernels* lawcat_kernels = nullptr;

struct LawcatWindow {
    static constexpr std::size_t kInputs = 14;

    const ort::Api* api;
    const lawcat::Kernels& kernels = *lawcat_kernels;
    lawcat::Call fixed{};  // the attributes

    LawcatWindow(const ort::Api* api, const ort::KernelInfo* info) : api(api) {
        check(ort::int_attribute(api, info, "num_heads", &fixed.heads));
        check(ort::int_attribute(api, info, "kv_num_heads", &fixed.kv_heads));
        check(ort::int_attribute(api, info, "window", &fixed.window));
        check(ort::int_attribute(api, info, "rotated", &fixed.rotated));
        check(ort::float_attribute(api, info, "scale", &fixed.scale));
        check(ort::float_attribute(api, info, "softcap", &fixed.softcap));
        check(ort::float_attribute(api, info, "temperature", &fixed.temperature));
        // Files written before there was a floor don't have it.
        if (ort::Status* status = ort::float_attribute(api, info, "lowest", &fixed.lowest)) {
            ort::release_status(api, status);
            fixed.lowest = 0.0f;
        }
        if (fixed.kv_heads < 1 || fixed.heads < 1 || fixed.heads % fixed.kv_heads != 0)
            fail(api, "lincompile.LawcatWindow: %lld query heads can't be divided among %lld key heads",
                 static_cast<long long>(fixed.heads), static_cast<long long>(fixed.kv_heads));
        if (fixed.window < 1 || !(fixed.temperature > 0.0f))
            fail(api, "lincompile.LawcatWindow: window and temperature must be positive, got %lld and %g",
                 static_cast<long long>(fixed.window), static_cast<double>(fixed.temperature));
        if (!(fixed.lowest <= 0.0f))
            fail(api, "lincompile.LawcatWindow: lowest must be negative (0: none), got %g",
                 static_cast<double>(fixed.lowest));
        if (fixed.rotated != 0 && fixed.rotated != 1)
            fail(api, "lincompile.LawcatWindow: rotated must be 0 or 1, got %lld", static_cast<long long>(fixed.rotated));
    }

    void compute(ort::KernelContext* context) const {
        static const char* const names[kInputs] = {"qkv", "hidden", "cos", "sin", "mask", "past_conv", "past_state",
                                                   "conv", "map_weight", "map_bias", "projection", "gate_up",
                                                   "gate_bias", "mix_bias"};
        static const std::size_t ranks[kInputs] = {3, 3, 3, 3, 2, 3, 2, 2, 3, 2, 2, 2, 1, 1};
        lawcat::Call c = fixed;
        const float** const data[kInputs] = {&c.qkv, &c.hidden, &c.cosine, &c.sine, &c.mask, &c.past_conv,
                                             &c.past_state, &c.taps, &c.map_weight, &c.map_bias, &c.projection,
                                             &c.gate_up, &c.gate_bias, &c.mix_bias};
        Shape shapes[kInputs];
        for (std::size_t i = 0; i < kInputs; i++) {
            const ort::Value* value = input_value(api, context, i);
            shapes[i] = shape_of(api, value);
            *data[i] = data_of<const float>(api, value);
            if (shapes[i].sizes.size() != ranks[i])
                fail(api, "lincompile.LawcatWindow: %s must have %zu axes, got %s", names[i], ranks[i],
                     shapes[i].text().c_str());
        }
        c.batch = shapes[0].sizes[0], c.tokens = shapes[0].sizes[1];
        c.width = shapes[1].sizes[2];
        c.size = shapes[8].sizes[2];
        c.taps_count = shapes[7].sizes[0];
        c.rank = shapes[11].sizes[0];
        const int64_t features = c.kv_heads * 2 * c.size;
        const std::vector<int64_t> wanted[kInputs] = {{c.batch, c.tokens, c.qkv_row()},
                                                      {c.batch, c.tokens, c.width},
                                                      {c.batch, c.tokens, c.size},
                                                      {c.batch, c.tokens, c.size},
                                                      {c.batch, c.tokens},
                                                      {c.batch, c.channels(), c.taps_count - 1},
                                                      {c.batch, c.state_row()},
                                                      {c.taps_count, c.channels()},
                                                      {c.kv_heads, c.size, c.size},
                                                      {c.kv_heads, c.size},
                                                      {c.projected_row(), c.width},
                                                      {c.rank, features},
                                                      {features},
                                                      {2 * c.heads}};
        for (std::size_t i = 0; i < kInputs; i++)
            if (shapes[i].sizes != wanted[i])
                fail(api, "lincompile.LawcatWindow: %s must be %s, got %s", names[i], Shape{wanted[i]}.text().c_str(),
                     shapes[i].text().c_str());
        if (c.size < 2 || c.size % 2 != 0 || c.taps_count < 1)
            fail(api, "lincompile.LawcatWindow: heads of %lld can't be rotated, or %lld taps",
                 static_cast<long long>(c.size), static_cast<long long>(c.taps_count));
        read_masks(c);
        c.output = result(context, 0, {c.batch, c.tokens, c.heads * c.size});
        c.present_conv = result(context, 1, wanted[5]);
        c.present_state = result(context, 2, wanted[6]);
        const int64_t steps = c.batch * c.tokens;
        c.projected.resize(steps * c.projected_row());
        spread(api, context, steps, steps * c.projected_row() * c.width,
               [&](int64_t first, int64_t last) { kernels.project(c, first, last); });
        const int64_t work = steps * c.heads * c.size * (2 * c.size + 2 * c.window) * 2;
        spread(api, context, c.batch * c.kv_heads, work, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) kernels.head(c, i / c.kv_heads, i % c.kv_heads);
        });
        write_real(c);
    }

    float* result(ort::KernelContext* context, std::size_t index, const std::vector<int64_t>& shape) const {
        ort::Value* value = nullptr;
        check(ort::output(api, context, index, static_cast<const int64_t*>(shape.data()), shape.size(), &value));
        return data_of<float>(api, value);
    }

    // Which tokens of the old windows are real, and where each row's last real token is.
    static void read_masks(lawcat::Call& c) {
        const int64_t past = c.window - 1;
        for (int64_t row = 0; row < c.batch; row++) {
            const float* real = c.past_state + (row + 1) * c.state_row() - past;
            c.past_real.insert(c.past_real.end(), real, real + past);
            int64_t last = c.tokens;
            while (last > 0 && c.mask[row * c.tokens + last - 1] == 0.0f) last--;
            c.last.push_back(last);
        }
    }

    static void write_real(const lawcat::Call& c) {
        const int64_t past = c.window - 1;
        for (int64_t row = 0; row < c.batch; row++)
            for (int64_t j = 0; j < past; j++) {
                const int64_t at = c.last[row] + j;
                c.present_state[(row + 1) * c.state_row() - past + j] =
                    at < past ? c.past_real[row * past + at] : c.mask[row * c.tokens + at - past];
            }
    }
};

}  // namespace
