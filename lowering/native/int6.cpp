// The kernels in plain C++ (any processor), and the choice between them and those of int6_x86.cpp.
#include "int6.h"

#include <cmath>
#include <cstring>

namespace int6 {

Tokens::Tokens(int64_t count, int64_t groups)
    : count(count), groups(groups) {
    const int64_t padded = (count + kTokenBlock - 1) / kTokenBlock * kTokenBlock;
    codes.resize(padded * groups * kGroup);
    scale.resize(padded * groups);
    offset.resize(padded * groups);
}

float from_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
    float value;
    if (exponent == 0) {
        value = std::ldexp(static_cast<float>(mantissa), -24);
        return sign ? -value : value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

namespace {

void quantize_group(const float* x, int64_t length, int8_t* codes, float* scale, int32_t* offset) {
    float largest = 0.0f;
    bool finite = true;
    for (int64_t k = 0; k < length; k++) {
        const float size = std::fabs(x[k]);
        finite &= size <= 3.4028234e38f;
        largest = size > largest ? size : largest;
    }
    std::memset(codes, 0, kGroup);
    *offset = 0;
    if (!finite) {  // the codes don't matter: the result must not look finite
        *scale = NAN;
        return;
    }
    *scale = largest / 127.0f;
    if (*scale == 0.0f) return;
    int32_t sum = 0;
    for (int64_t k = 0; k < length; k++) {
        float code = std::nearbyint(x[k] / *scale);
        code = code > 127.0f ? 127.0f : code < -128.0f ? -128.0f : code;  // a subnormal scale can be far off
        codes[k / 2 + k % 2 * (kGroup / 2)] = static_cast<int8_t>(code);
        sum += static_cast<int32_t>(code);
    }
    *offset = -32 * sum;
}

void quantize(const float* x, int64_t width, Tokens& tokens, int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m++)
        for (int64_t g = 0; g < tokens.groups; g++) {
            const int64_t start = g * kGroup, at = m * tokens.groups + g;
            const int64_t length = width - start < kGroup ? width - start : kGroup;
            quantize_group(x + m * width + start, length, &tokens.codes[at * kGroup], &tokens.scale[at],
                           &tokens.offset[at]);
        }
}

// One row to unsigned codes in the order of the activations; `codes` is as wide as the groups.
void unpack_row(const uint8_t* high, const uint8_t* low, uint8_t* codes, int64_t groups) {
    for (int64_t g = 0; g < groups; g++, high += kGroup / 2, low += kGroup / 4, codes += kGroup)
        for (int j = 0; j < kGroup / 2; j++) {
            const uint8_t two = static_cast<uint8_t>(low[j / 2] >> (j % 2 * 4));
            codes[j] = static_cast<uint8_t>((high[j] & 15) << 2 | (two & 3));
            codes[kGroup / 2 + j] = static_cast<uint8_t>(high[j] >> 4 << 2 | (two >> 2 & 3));
        }
}

void multiply(const Matrix& weight, const Tokens& tokens, float* y, int64_t first, int64_t last) {
    const int64_t groups = weight.groups();
    std::vector<uint8_t> codes(groups * kGroup), high(groups * kGroup / 2), low(groups * kGroup / 4);
    std::vector<float> scale(groups);
    for (int64_t n = first; n < last; n++) {
        std::memcpy(high.data(), weight.high + n * weight.high_bytes(), weight.high_bytes());
        std::memcpy(low.data(), weight.low + n * weight.low_bytes(), weight.low_bytes());
        unpack_row(high.data(), low.data(), codes.data(), groups);
        for (int64_t g = 0; g < groups; g++) scale[g] = from_half(weight.scale[n * groups + g]);
        for (int64_t m = 0; m < tokens.count; m++) {
            float total = 0.0f;
            for (int64_t g = 0; g < groups; g++) {
                const int8_t* a = &tokens.codes[(m * groups + g) * kGroup];
                const uint8_t* u = &codes[g * kGroup];
                int32_t sum = tokens.offset[m * groups + g];
                for (int k = 0; k < kGroup; k++) sum += static_cast<int32_t>(u[k]) * a[k];
                total += static_cast<float>(sum) * (scale[g] * tokens.scale[m * groups + g]);
            }
            y[m * weight.rows + n] = total;
        }
    }
}

}  // namespace

const Kernels portable{"portable", quantize, multiply};

const Kernels* choose(const char* name) {
    const Kernels* known[] = {
#if defined(__x86_64__)
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
            ? &avx512vnni
            : nullptr,
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2 : nullptr,
#endif
        &portable,
    };
    for (const Kernels* kernels : known)
        if (kernels != nullptr && std::strcmp(name, kernels->name) == 0) return kernels;
    return nullptr;
}

}  // namespace int6
