// Gated linear attention, the recurrence that com.microsoft.LinearAttention computes with update_rule "gated":
// S ← exp(g_t) ⊙ S + k_tᵀ v_t,  o_t = scale · q_t S.
//
// Run token by token with a tile of the state in registers. Unlike the form in chunks of matrix products this holds for
// decays of any strength (−∞ included), and a step of one token is the same code.
#pragma once

#include <cstdint>
#include <vector>

namespace attention {

struct Call {
    const float* query;    // [batch, tokens, kv_heads · group, keys]
    const float* key;      // [batch, tokens, kv_heads, keys]
    const float* value;    // [batch, tokens, kv_heads, values]
    const float* past;     // [batch, kv_heads, keys, values]
    const float* decay;    // [batch, tokens, kv_heads, keys], or [batch, tokens, kv_heads, 1] (decay_keys = 1)
    float* output;         // [batch, tokens, kv_heads · group, values]
    float* present;        // as past
    int64_t batch, tokens, kv_heads, group, keys, values, decay_keys;
    float scale;
    std::vector<float> factor;  // exp(decay)

    int64_t decay_row() const { return kv_heads * decay_keys; }
    int64_t heads() const { return batch * kv_heads; }
};

constexpr int64_t kColumns = 48;  // in one task

struct Kernels {
    // exp of the decays of tokens first … last − 1, counted over the batch.
    void (*exponentials)(Call& call, int64_t first, int64_t last);
    // Columns first … last − 1 of the state and outputs of one head of one row of the batch.
    void (*columns)(const Call& call, int64_t head, int64_t first, int64_t last);
};

extern const Kernels portable;
extern const Kernels avx512;

}  // namespace attention
