#include "attention.h"

#include <algorithm>
#include <cmath>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) static inline
#endif

namespace attention {
namespace {

// Where one head of one row of the batch begins in each tensor, and how far apart its tokens are.
struct Head {
    const float *query, *key, *value, *past, *factor;
    float *output, *present;
    int64_t query_row, key_row, value_row, factor_row, output_row;

    Head(const Call& c, int64_t head)
        : query_row(c.kv_heads * c.group * c.keys),
          key_row(c.kv_heads * c.keys),
          value_row(c.kv_heads * c.values),
          factor_row(c.decay_row()),
          output_row(c.kv_heads * c.group * c.values) {
        const int64_t first = head / c.kv_heads * c.tokens, h = head % c.kv_heads;
        query = c.query + first * query_row + h * c.group * c.keys;
        key = c.key + first * key_row + h * c.keys;
        value = c.value + first * value_row + h * c.values;
        factor = c.factor.data() + first * factor_row + h * c.decay_keys;
        output = c.output + first * output_row + h * c.group * c.values;
        past = c.past + head * c.keys * c.values;
        present = c.present + head * c.keys * c.values;
    }
};

void exponentials_portable(Call& c, int64_t first, int64_t last) {
    for (int64_t i = first * c.decay_row(); i < last * c.decay_row(); i++) c.factor[i] = std::exp(c.decay[i]);
}

void columns_portable(const Call& c, int64_t head, int64_t column, int64_t end) {
    const Head at(c, head);
    const int64_t width = end - column, step = c.decay_keys > 1 ? 1 : 0;
    for (int64_t r = 0; r < c.keys; r++)
        std::copy_n(at.past + r * c.values + column, width, at.present + r * c.values + column);
    for (int64_t t = 0; t < c.tokens; t++) {
        const float *value = at.value + t * at.value_row + column, *key = at.key + t * at.key_row;
        const float* factor = at.factor + t * at.factor_row;
        for (int64_t g = 0; g < c.group; g++)
            std::fill_n(at.output + t * at.output_row + g * c.values + column, width, 0.0f);
        for (int64_t r = 0; r < c.keys; r++) {
            float* state = at.present + r * c.values + column;
            for (int64_t j = 0; j < width; j++) state[j] = state[j] * factor[r * step] + key[r] * value[j];
            for (int64_t g = 0; g < c.group; g++) {
                float* out = at.output + t * at.output_row + g * c.values + column;
                const float q = at.query[t * at.query_row + g * c.keys + r] * c.scale;
                for (int64_t j = 0; j < width; j++) out[j] += q * state[j];
            }
        }
    }
}

#if defined(__x86_64__)

// exp in single precision, within two units in the last place: 2ⁿ · e^r with |r| ≤ ln 2 / 2. −∞ gives 0, NaN stays.
AVX512_INLINE __m512 exp512(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(120.0f), _mm512_max_ps(_mm512_set1_ps(-120.0f), x));  // NaN is the second operand
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);  // Taylor: the next term is below 6e-9 on this range
    for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(term));
    return _mm512_scalef_ps(p, n);
}

AVX512 void exponentials512(Call& c, int64_t first, int64_t last) {
    const int64_t end = last * c.decay_row();
    for (int64_t i = first * c.decay_row(); i < end; i += 16) {
        const __mmask16 some = static_cast<__mmask16>(end - i >= 16 ? 0xFFFF : (1 << (end - i)) - 1);
        _mm512_mask_storeu_ps(&c.factor[i], some, exp512(_mm512_maskz_loadu_ps(some, c.decay + i)));
    }
}

constexpr int64_t kTokens = 64, kLanes = 16;

// For each tile of R rows (keys), then each of some tokens: R factors, R keys and R queries of each head that reads the
// state, side by side. In the tensors they are as far apart as would fill a few sets of the cache only.
template <int R>
float* pack512(const Call& c, const Head& at, int64_t row, int64_t first, int64_t last, float* to) {
    const int64_t step = c.decay_keys > 1 ? 1 : 0;
    for (int64_t t = first; t < last; t++) {
        const float* factor = at.factor + t * at.factor_row + row * step;
        for (int r = 0; r < R; r++) *to++ = factor[r * step];
        to = std::copy_n(at.key + t * at.key_row + row, R, to);
        for (int64_t g = 0; g < c.group; g++) to = std::copy_n(at.query + t * at.query_row + g * c.keys + row, R, to);
    }
    return to;
}

// R rows of the state by 16 columns, over some tokens, for G of the heads that read it.
template <int R, int G>
AVX512_INLINE void tile512(const Call& c, const Head& at, const float* packed, const float* from, float* to, int64_t row,
                           int64_t column, int64_t head, int64_t first, int64_t last, __mmask16 some) {
    __m512 state[R];
    for (int r = 0; r < R; r++) state[r] = _mm512_maskz_loadu_ps(some, from + (row + r) * c.values + column);
    const __m512 scale = _mm512_set1_ps(c.scale);
    for (int64_t t = first; t < last; t++, packed += (2 + c.group) * R) {
        const __m512 value = _mm512_maskz_loadu_ps(some, at.value + t * at.value_row + column);
        const float *key = packed + R, *query = packed + (2 + head) * R;
        __m512 total[G];
        for (int g = 0; g < G; g++) total[g] = _mm512_setzero_ps();
        for (int r = 0; r < R; r++) {
            const __m512 update = _mm512_mul_ps(_mm512_set1_ps(key[r]), value);
            state[r] = _mm512_fmadd_ps(state[r], _mm512_set1_ps(packed[r]), update);
            for (int g = 0; g < G; g++) total[g] = _mm512_fmadd_ps(_mm512_set1_ps(query[g * R + r]), state[r], total[g]);
        }
        for (int g = 0; g < G; g++) {
            float* out = at.output + t * at.output_row + (head + g) * c.values + column;
            const __m512 before = row > 0 ? _mm512_maskz_loadu_ps(some, out) : _mm512_setzero_ps();
            _mm512_mask_storeu_ps(out, some, _mm512_fmadd_ps(total[g], scale, before));
        }
    }
    if (to != nullptr)
        for (int r = 0; r < R; r++) _mm512_mask_storeu_ps(to + (row + r) * c.values + column, some, state[r]);
}

// All heads, four at a time; each time from the same state, which the last time is given to keep.
template <int R>
AVX512 void rows512(const Call& c, const Head& at, const float* packed, int64_t row, int64_t column, int64_t first,
                    int64_t last, __mmask16 some) {
    const float* from = first == 0 ? at.past : at.present;
    for (int64_t head = 0; head < c.group; head += 4) {
        const int64_t left = c.group - head;
        float* to = left <= 4 ? at.present : nullptr;
        if (left >= 4) tile512<R, 4>(c, at, packed, from, to, row, column, head, first, last, some);
        if (left == 3) tile512<R, 3>(c, at, packed, from, to, row, column, head, first, last, some);
        if (left == 2) tile512<R, 2>(c, at, packed, from, to, row, column, head, first, last, some);
        if (left == 1) tile512<R, 1>(c, at, packed, from, to, row, column, head, first, last, some);
    }
}

AVX512 void columns512(const Call& c, int64_t head, int64_t begin, int64_t end) {
    const Head at(c, head);
    const int64_t by16 = c.keys / 16 * 16, by4 = c.keys / 4 * 4;
    std::vector<float> packed(std::min(c.tokens, kTokens) * c.keys * (2 + c.group));
    for (int64_t first = 0; first < c.tokens; first += kTokens) {
        const int64_t last = std::min(c.tokens, first + kTokens), pitch = (last - first) * (2 + c.group);
        float* to = packed.data();
        for (int64_t row = 0; row < by16; row += 16) to = pack512<16>(c, at, row, first, last, to);
        for (int64_t row = by16; row < by4; row += 4) to = pack512<4>(c, at, row, first, last, to);
        for (int64_t row = by4; row < c.keys; row++) to = pack512<1>(c, at, row, first, last, to);
        for (int64_t column = begin; column < end; column += kLanes) {
            const __mmask16 some = static_cast<__mmask16>((1 << std::min(kLanes, end - column)) - 1);
            const float* from = packed.data();
            for (int64_t row = 0; row < by16; row += 16)
                rows512<16>(c, at, from + row * pitch, row, column, first, last, some);
            for (int64_t row = by16; row < by4; row += 4)
                rows512<4>(c, at, from + row * pitch, row, column, first, last, some);
            for (int64_t row = by4; row < c.keys; row++)
                rows512<1>(c, at, from + row * pitch, row, column, first, last, some);
        }
    }
}

#endif

}  // namespace

const Kernels portable{exponentials_portable, columns_portable};
#if defined(__x86_64__)
const Kernels avx512{exponentials512, columns512};
#endif

}  // namespace attention
