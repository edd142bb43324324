// The kernels of layers.h; kernels.cpp includes this once for each processor, after vectors.h.

TARGET void norm(const layers::Norm& c, int64_t first, int64_t last) {
    const int64_t width = c.width, whole = width / LANES * LANES;
    for (int64_t row = first; row < last; row++) {
        const float* x = c.x + row * width;
        if (c.residual != nullptr) {
            const float* residual = c.residual + row * width;
            float* sum = c.sum + row * width;
            for (int64_t i = 0; i < whole; i += LANES) store(sum + i, load(x + i) + load(residual + i));
            for (int64_t i = whole; i < width; i++) sum[i] = x[i] + residual[i];
            x = sum;
        }
        Vector squares = all(0.0f);
        for (int64_t i = 0; i < whole; i += LANES) squares += load(x + i) * load(x + i);
        float total = sum_of(squares);
        for (int64_t i = whole; i < width; i++) total += x[i] * x[i];
        const float root = std::sqrt(total / static_cast<float>(width) + c.epsilon);
        float* y = c.y + row * width;
        for (int64_t i = 0; i < whole; i += LANES) store(y + i, load(x + i) / root * load(c.weight + i));
        for (int64_t i = whole; i < width; i++) y[i] = x[i] / root * c.weight[i];
    }
}

TARGET void swiglu(const float* x, float* y, int64_t width, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const float *gate = x + row * 2 * width, *up = gate + width;
        float* to = y + row * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            const Vector g = load(gate + i);
            store(to + i, g / (1.0f + exponential(-g)) * load(up + i));
        }
        for (; i < width; i++) to[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
}
