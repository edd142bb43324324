// Six-bit weights times eight-bit activations: `int6_linear` with activation "a8" in groups of 128.
//
// Weights are the file's planes, codes in input order, low bits first: byte j of a row's `high` holds the upper four
// bits of codes 2j and 2j + 1, byte j of `low` the lower two of codes 4j … 4j + 3; u = c + 32 = 4·high + low. Rows end
// after the last code. Activations are kept per group with the even inputs first, then the odd ones, which is the order
// in which the nibbles of 64 bytes come apart.
#pragma once

#include <cstdint>
#include <vector>

namespace int6 {

constexpr int64_t kGroup = 128;
constexpr int64_t kTokenBlock = 8;  // the matrix kernels take tokens by eight: buffers are padded with zeros to that

struct Matrix {
    const uint8_t* high;    // [rows, ceil(width/2)]
    const uint8_t* low;     // [rows, ceil(width/4)]
    const uint16_t* scale;  // float16 [rows, groups]
    int64_t rows, width;

    int64_t groups() const { return (width + kGroup - 1) / kGroup; }
    int64_t high_bytes() const { return (width + 1) / 2; }
    int64_t low_bytes() const { return (width + 3) / 4; }
};

// Activations in int8: one scale per token and group.
struct Tokens {
    Tokens(int64_t count, int64_t groups);

    int64_t count, groups;
    std::vector<int8_t> codes;    // [padded count, groups, kGroup]
    std::vector<float> scale;     // [padded count, groups]; NaN where the group holds NaN or infinity
    std::vector<int32_t> offset;  // [padded count, groups]: −32 · Σ codes, what the offset of u comes to
};

struct Kernels {
    const char* name;
    // Tokens first … last − 1 of x [count, width].
    void (*quantize)(const float* x, int64_t width, Tokens& tokens, int64_t first, int64_t last);
    // Columns first … last − 1 of y [count, rows]; first is a multiple of kRowBlock.
    void (*multiply)(const Matrix& weight, const Tokens& tokens, float* y, int64_t first, int64_t last);
};

constexpr int64_t kRowBlock = 32;

constexpr char avx512vnni_name[] = "avx512vnni", avx2_name[] = "avx2";

extern const Kernels portable;
extern const Kernels avx2;
extern const Kernels avx512vnni;

// Kernels by name; null where there are none of that name or this processor doesn't run them.
const Kernels* choose(const char* name);

float from_half(uint16_t half);

}  // namespace int6
