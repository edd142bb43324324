// A whole attention site between its projections: LAWCAT (convolutions, Hedgehog features, decay gate, normalised gated
// recurrence) and rotary softmax over the nearest keys, each by its share. `lowering/onnx/lawcat.py` has the shapes.
//
// The tokens of one key head and its query heads are taken in blocks small enough that what lies between two steps
// stays in the cache. Past and present states may be one buffer: a head reads all that it needs before it writes.
#pragma once

#include <cstdint>
#include <vector>

namespace lawcat {

struct Call {
    const float *qkv, *hidden, *cosine, *sine, *mask, *past_conv, *past_state;
    const float *taps, *map_weight, *map_bias, *projection, *gate_up, *gate_bias, *mix_bias;
    float *output, *present_conv, *present_state;
    int64_t batch, tokens, heads, kv_heads, size, width, taps_count, rank, window;
    int64_t rotated;  // 1: LAWCAT reads queries and keys after the rotary embedding, as the window does
    float scale, softcap, temperature;
    float lowest;  // floor of the log-decays; 0: none
    std::vector<float> projected;  // [batch · tokens, rank | 2 · heads, the latter as shares]
    std::vector<float> past_real;  // [batch, window − 1]
    std::vector<int64_t> last;     // [batch]: one past the last real token

    int64_t group() const { return heads / kv_heads; }
    int64_t channels() const { return (heads + kv_heads) * size; }
    int64_t qkv_row() const { return (heads + 2 * kv_heads) * size; }
    int64_t projected_row() const { return rank + 2 * heads; }
    int64_t state_numbers() const { return kv_heads * 2 * size * (size + 1); }
    int64_t cache_row() const { return 2 * kv_heads * size; }
    int64_t state_row() const { return state_numbers() + (window - 1) * (cache_row() + 1); }
};

struct Kernels {
    // The gate's inner projection and the shares of tokens first … last − 1, counted over the batch.
    void (*project)(Call& call, int64_t first, int64_t last);
    // One key head of one row of the batch, and the query heads that share it.
    void (*head)(const Call& call, int64_t row, int64_t kv_head);
};

extern const Kernels portable;
extern const Kernels avx2;
extern const Kernels avx512;

}  // namespace lawcat
