// What lies between the linear layers: norms, gates and look-ups (`lowering/onnx/layers.py`).
#pragma once

#include <cstdint>

namespace layers {

struct Norm {
    const float *x, *residual, *weight;  // [rows, width], the same or null, [width]
    float *y, *sum;                      // [rows, width]; x + residual where there is one
    int64_t width;
    float epsilon;
};

struct Kernels {
    // weight · x / √(mean(x²) + ε), x being the sum where there is a residual, of rows first … last − 1.
    void (*norm)(const Norm& call, int64_t first, int64_t last);
    // silu(x[:width]) · x[width:] of such rows of x [rows, 2 · width].
    void (*swiglu)(const float* x, float* y, int64_t width, int64_t first, int64_t last);
};

extern const Kernels portable;
extern const Kernels avx2;
extern const Kernels avx512;

}  // namespace layers
