// The kernels for AVX-512 with VNNI and for AVX2; which of them runs is decided when the library is loaded.
#include "int6.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) static inline
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE AVX2 __attribute__((always_inline)) static inline

namespace int6 {
namespace {

constexpr int64_t kHalf = kGroup / 2, kQuarter = kGroup / 4;
constexpr int64_t kScales = 16;  // scales converted from float16 at a time

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- AVX-512

struct Codes512 {
    __m512i even, odd;
};

// One group of a row: 64 bytes of nibbles and 32 of pairs to u = 4·high + low, the even codes and the odd ones.
AVX512_INLINE Codes512 unpack512(__m512i high, __m256i low) {
    const __m512i nibble = _mm512_set1_epi8(15), upper = _mm512_set1_epi8(0x3C), pair = _mm512_set1_epi8(3);
    const __m512i wide = _mm512_cvtepu8_epi16(low);
    // Truth tables of three operands: 0xA8 is (a | b) & c, 0xCA takes b where a is set and c elsewhere.
    const __m512i two = _mm512_ternarylogic_epi32(wide, _mm512_slli_epi16(wide, 4), nibble, 0xA8);
    const __m512i even = _mm512_ternarylogic_epi32(upper, _mm512_slli_epi16(high, 2), two, 0xCA);
    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(two, 2), pair);
    return {even, _mm512_ternarylogic_epi32(upper, _mm512_srli_epi16(high, 2), second, 0xCA)};
}

AVX512_INLINE __mmask64 first_bytes(int64_t count) {
    return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
}

AVX512 void quantize512(const float* x, int64_t width, Tokens& tokens, int64_t first, int64_t last) {
    const __m512 limit = _mm512_set1_ps(3.4028234e38f);
    for (int64_t m = first; m < last; m++)
        for (int64_t g = 0; g < tokens.groups; g++) {
            const int64_t start = g * kGroup, at = m * tokens.groups + g;
            const uint64_t length = static_cast<uint64_t>(smaller(width - start, kGroup));
            const float* in = x + m * width + start;
            __m512 values[8], largest = _mm512_setzero_ps();
            __mmask16 odd = 0;
            for (int i = 0; i < 8; i++) {
                const __mmask16 some = static_cast<__mmask16>(first_bytes(static_cast<int64_t>(length) - 16 * i));
                values[i] = _mm512_maskz_loadu_ps(some, in + 16 * i);
                const __m512 size = _mm512_abs_ps(values[i]);
                odd |= _mm512_cmp_ps_mask(size, limit, _CMP_NLE_UQ);
                largest = _mm512_max_ps(largest, size);
            }
            const float scale = odd ? NAN : _mm512_reduce_max_ps(largest) / 127.0f;
            tokens.scale[at] = scale;
            int8_t* codes = &tokens.codes[at * kGroup];
            alignas(64) int8_t plain[kGroup];
            const __m512 divisor = _mm512_set1_ps(scale > 0.0f ? scale : 1.0f);
            const __m512 nothing = _mm512_setzero_ps();
            for (int i = 0; i < 8; i++) {
                const __m512 value = scale > 0.0f ? _mm512_div_ps(values[i], divisor) : nothing;
                const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(value));
                _mm_store_si128(reinterpret_cast<__m128i*>(plain + 16 * i), bytes);
            }
            __m512i sum = _mm512_setzero_si512();
            for (int i = 0; i < 2; i++) {
                const __m512i both = _mm512_load_si512(plain + 64 * i);
                sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), both);
                const __m256i evens = _mm512_cvtepi16_epi8(both);
                const __m256i odds = _mm512_cvtepi16_epi8(_mm512_srli_epi16(both, 8));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 32 * i), evens);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + kHalf + 32 * i), odds);
            }
            tokens.offset[at] = -32 * _mm512_reduce_add_epi32(sum);
        }
}

// One group of R rows by T tokens, added to the totals; a partial group is read under masks.
template <int R, int T, bool Whole>
AVX512_INLINE void group512(const Matrix& weight, const Tokens& tokens, int64_t n, int64_t m, int64_t g,
                            const float (*scale)[T][kScales], __m512 (*total)[T]) {
    const int64_t groups = weight.groups(), high_bytes = weight.high_bytes(), low_bytes = weight.low_bytes();
    const __mmask64 high_mask = first_bytes(high_bytes - g * kHalf);
    const __mmask32 low_mask = static_cast<__mmask32>(first_bytes(low_bytes - g * kQuarter));
    __m512i even[T], odd[T], offset[T];
    for (int t = 0; t < T; t++) {
        const int64_t at = (m + t) * groups + g;
        even[t] = _mm512_loadu_si512(&tokens.codes[at * kGroup]);
        odd[t] = _mm512_loadu_si512(&tokens.codes[at * kGroup + kHalf]);
        offset[t] = _mm512_maskz_loadu_epi32(1, &tokens.offset[at]);
    }
    for (int r = 0; r < R; r++) {
        const uint8_t* high = weight.high + (n + r) * high_bytes + g * kHalf;
        const uint8_t* low = weight.low + (n + r) * low_bytes + g * kQuarter;
        // The rows after these: a token reads every weight once, mostly from memory.
        _mm_prefetch(reinterpret_cast<const char*>(high + R * high_bytes), _MM_HINT_T0);
        if (r % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(low + R * low_bytes), _MM_HINT_T0);
        const Codes512 u =
            Whole ? unpack512(_mm512_loadu_si512(high), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)))
                  : unpack512(_mm512_maskz_loadu_epi8(high_mask, high), _mm256_maskz_loadu_epi8(low_mask, low));
        for (int t = 0; t < T; t++) {
            __m512i sum = _mm512_dpbusd_epi32(offset[t], u.even, even[t]);
            sum = _mm512_dpbusd_epi32(sum, u.odd, odd[t]);
            const __m512 factor = _mm512_set1_ps(scale[r][t][g % kScales]);
            total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, total[r][t]);
        }
    }
}

// A few tokens: R rows by T tokens, dot products along the rows.
template <int R, int T>
AVX512_INLINE void dots512(const Matrix& weight, const Tokens& tokens, float* y, int64_t n, int64_t m) {
    const int64_t groups = weight.groups(), whole = weight.width / kGroup;
    __m512 total[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) total[r][t] = _mm512_setzero_ps();
    for (int64_t from = 0; from < groups; from += kScales) {
        const __mmask16 used = static_cast<__mmask16>(first_bytes(groups - from));
        alignas(64) float scale[R][T][kScales];
        for (int t = 0; t < T; t++) {
            const __m512 of_token = _mm512_maskz_loadu_ps(used, &tokens.scale[(m + t) * groups + from]);
            for (int r = 0; r < R; r++) {
                const __m256i halves = _mm256_maskz_loadu_epi16(used, weight.scale + (n + r) * groups + from);
                _mm512_store_ps(scale[r][t], _mm512_mul_ps(_mm512_cvtph_ps(halves), of_token));
            }
        }
        const int64_t until = smaller(groups, from + kScales);
        for (int64_t g = from; g < smaller(whole, until); g++)
            group512<R, T, true>(weight, tokens, n, m, g, scale, total);
        if (whole < groups && until == groups) group512<R, T, false>(weight, tokens, n, m, whole, scale, total);
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) y[(m + t) * weight.rows + n + r] = _mm512_reduce_add_ps(total[r][t]);
}

template <int T>
AVX512 void few512(const Matrix& weight, const Tokens& tokens, float* y, int64_t first, int64_t last, int64_t m) {
    constexpr int R = T == 1 ? 4 : 2;
    int64_t n = first;
    for (; n + R <= last; n += R) dots512<R, T>(weight, tokens, y, n, m);
    for (; n < last; n++) dots512<1, T>(weight, tokens, y, n, m);
}

// 16 rows of 16 words to 16 columns.
AVX512_INLINE void transpose512(__m512i* w) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(w[i], w[i + 1]), b = _mm512_unpackhi_epi32(w[i], w[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(w[i + 2], w[i + 3]), d = _mm512_unpackhi_epi32(w[i + 2], w[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88), b = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xDD);
        const __m512i c = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xDD);
        w[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        w[8 + i] = _mm512_shuffle_i32x4(a, c, 0xDD);
        w[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
        w[12 + i] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
}

// 16 rows of one group as words of four codes, a vector for each four inputs: tile[j] holds word j of every row.
AVX512_INLINE void tile512(const Matrix& weight, int64_t n, int64_t rows, int64_t g, __m512i* tile) {
    const __mmask64 high_mask = first_bytes(weight.high_bytes() - g * kHalf);
    const __mmask32 low_mask = static_cast<__mmask32>(first_bytes(weight.low_bytes() - g * kQuarter));
    for (int64_t r = 0; r < 16; r++) {
        const int64_t row = n + smaller(r, rows - 1);  // rows past the end are computed and not stored
        const uint8_t* high = weight.high + row * weight.high_bytes() + g * kHalf;
        const uint8_t* low = weight.low + row * weight.low_bytes() + g * kQuarter;
        const Codes512 u =
            unpack512(_mm512_maskz_loadu_epi8(high_mask, high), _mm256_maskz_loadu_epi8(low_mask, low));
        tile[r] = u.even;
        tile[16 + r] = u.odd;
    }
    transpose512(tile);
    transpose512(tile + 16);
}

AVX512_INLINE __m512 scales512(const Matrix& weight, int64_t n, int64_t rows, int64_t g) {
    alignas(32) uint16_t halves[16];
    for (int64_t r = 0; r < 16; r++) halves[r] = weight.scale[(n + smaller(r, rows - 1)) * weight.groups() + g];
    return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(halves)));
}

// Many tokens: 32 rows by eight tokens, a lane for each row.
AVX512 void block512(const Matrix& weight, const Tokens& tokens, float* y, int64_t n, int64_t rows) {
    constexpr int64_t kChunk = 256;
    constexpr int T = kTokenBlock;
    const int64_t groups = weight.groups(), first_rows = smaller(rows, 16), second_rows = rows - first_rows;
    const int64_t second = second_rows > 0 ? n + 16 : n;
    alignas(64) float total[kChunk][kRowBlock];
    for (int64_t from = 0; from < tokens.count; from += kChunk) {
        const int64_t count = smaller(tokens.count - from, kChunk);
        std::memset(total, 0, sizeof(float) * kRowBlock * ((count + T - 1) / T * T));
        for (int64_t g = 0; g < groups; g++) {
            __m512i tile[2][32];
            tile512(weight, n, first_rows, g, tile[0]);
            tile512(weight, second, second_rows > 0 ? second_rows : 1, g, tile[1]);
            const int words = static_cast<int>((smaller(weight.width - g * kGroup, kGroup) + 7) / 8);
            const __m512 scale0 = scales512(weight, n, first_rows, g);
            const __m512 scale1 = scales512(weight, second, second_rows > 0 ? second_rows : 1, g);
            for (int64_t m = 0; m < count; m += T) {
                const int64_t at = (from + m) * groups + g;
                const int8_t* codes = &tokens.codes[at * kGroup];
                __m512i sum0[T], sum1[T];
                for (int t = 0; t < T; t++) sum0[t] = sum1[t] = _mm512_set1_epi32(tokens.offset[at + t * groups]);
                for (int half = 0; half < 32; half += 16)  // the even codes, then the odd ones
                    for (int j = half; j < half + words; j++) {
                        const __m512i u0 = tile[0][j], u1 = tile[1][j];
                        for (int t = 0; t < T; t++) {
                            int32_t word;
                            std::memcpy(&word, codes + t * groups * kGroup + 4 * j, sizeof word);
                            const __m512i a = _mm512_set1_epi32(word);
                            sum0[t] = _mm512_dpbusd_epi32(sum0[t], u0, a);
                            sum1[t] = _mm512_dpbusd_epi32(sum1[t], u1, a);
                        }
                    }
                for (int t = 0; t < T; t++) {
                    float* out = total[m + t];
                    const __m512 scale = _mm512_set1_ps(tokens.scale[at + t * groups]);
                    _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum0[t]), _mm512_mul_ps(scale0, scale),
                                                         _mm512_load_ps(out)));
                    _mm512_store_ps(out + 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum1[t]),
                                                              _mm512_mul_ps(scale1, scale), _mm512_load_ps(out + 16)));
                }
            }
        }
        for (int64_t m = 0; m < count; m++)
            std::memcpy(y + (from + m) * weight.rows + n, total[m], sizeof(float) * rows);
    }
}

AVX512 void multiply512(const Matrix& weight, const Tokens& tokens, float* y, int64_t first, int64_t last) {
    switch (tokens.count) {
        case 0: return;
        case 1: return few512<1>(weight, tokens, y, first, last, 0);
        case 2: return few512<2>(weight, tokens, y, first, last, 0);
        case 3: return few512<3>(weight, tokens, y, first, last, 0);
        case 4: return few512<4>(weight, tokens, y, first, last, 0);
        default:
            for (int64_t n = first; n < last; n += kRowBlock)
                block512(weight, tokens, y, n, smaller(last - n, kRowBlock));
    }
}

// ---- AVX2

// One group: 128 codes u in the order of the activations, 64 even ones and 64 odd ones.
AVX2_INLINE void unpack256(const uint8_t* high, const uint8_t* low, uint8_t* out) {
    const __m256i nibble = _mm256_set1_epi8(15), upper = _mm256_set1_epi8(0x3C), pair = _mm256_set1_epi8(3);
    for (int i = 0; i < 2; i++) {
        const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + 32 * i));
        const __m128i l = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low + 16 * i));
        const __m256i wide = _mm256_cvtepu8_epi16(l);
        const __m256i two = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), nibble);
        const __m256i even = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(h, 2), upper), _mm256_and_si256(two, pair));
        const __m256i odd = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(h, 2), upper),
                                            _mm256_and_si256(_mm256_srli_epi16(two, 2), pair));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * i), even);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kHalf + 32 * i), odd);
    }
}

AVX2_INLINE float sum256(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// One unpacked row by T tokens.
template <int T>
AVX2_INLINE void dots256(const uint8_t* u, const float* scale, const Tokens& tokens, float* y, int64_t m,
                         int64_t rows) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 total[T];
    for (int t = 0; t < T; t++) total[t] = _mm256_setzero_ps();
    for (int64_t g = 0; g < tokens.groups; g++) {
        __m256i w[4];
        for (int i = 0; i < 4; i++) w[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(u + g * kGroup + 32 * i));
        for (int t = 0; t < T; t++) {
            const int64_t at = (m + t) * tokens.groups + g;
            const __m256i* a = reinterpret_cast<const __m256i*>(&tokens.codes[at * kGroup]);
            // 4 · 63 · 127 fits in 16 bits: two of the pairwise sums may be added before they are widened.
            const __m256i s0 = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], _mm256_loadu_si256(a)),
                                                _mm256_maddubs_epi16(w[1], _mm256_loadu_si256(a + 1)));
            const __m256i s1 = _mm256_add_epi16(_mm256_maddubs_epi16(w[2], _mm256_loadu_si256(a + 2)),
                                                _mm256_maddubs_epi16(w[3], _mm256_loadu_si256(a + 3)));
            __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(s0, ones), _mm256_madd_epi16(s1, ones));
            sum = _mm256_add_epi32(sum, _mm256_zextsi128_si256(_mm_cvtsi32_si128(tokens.offset[at])));
            const __m256 factor = _mm256_set1_ps(scale[g] * tokens.scale[at]);
            total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, total[t]);
        }
    }
    for (int t = 0; t < T; t++) y[(m + t) * rows] = sum256(total[t]);
}

AVX2 void multiply256(const Matrix& weight, const Tokens& tokens, float* y, int64_t first, int64_t last) {
    const int64_t groups = weight.groups(), whole = weight.width / kGroup;
    std::vector<uint8_t> codes(groups * kGroup);
    std::vector<float> scale(groups);
    for (int64_t n = first; n < last; n++) {
        const uint8_t *high = weight.high + n * weight.high_bytes(), *low = weight.low + n * weight.low_bytes();
        for (int64_t g = 0; g < whole; g++) unpack256(high + g * kHalf, low + g * kQuarter, &codes[g * kGroup]);
        if (whole < groups) {
            uint8_t high_end[kHalf] = {}, low_end[kQuarter] = {};
            std::memcpy(high_end, high + whole * kHalf, weight.high_bytes() - whole * kHalf);
            std::memcpy(low_end, low + whole * kQuarter, weight.low_bytes() - whole * kQuarter);
            unpack256(high_end, low_end, &codes[whole * kGroup]);
        }
        for (int64_t g = 0; g < groups; g++) scale[g] = _cvtsh_ss(weight.scale[n * groups + g]);
        int64_t m = 0;
        for (; m + 4 <= tokens.count; m += 4) dots256<4>(codes.data(), scale.data(), tokens, y + n, m, weight.rows);
        for (; m < tokens.count; m++) dots256<1>(codes.data(), scale.data(), tokens, y + n, m, weight.rows);
    }
}

}  // namespace

const Kernels avx512vnni{avx512vnni_name, quantize512, multiply512};
const Kernels avx2{avx2_name, portable.quantize, multiply256};

}  // namespace int6
#endif
