// Vectors of LANES floats and functions of them; kernels.cpp includes this once for each processor, with TARGET and LANES
// defined.

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

#define INLINE TARGET __attribute__((always_inline)) static inline

INLINE Vector load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
INLINE void store(float* to, Vector x) { *reinterpret_cast<Loose*>(to) = x; }
INLINE Vector all(float x) { return Vector{} + x; }
INLINE Vector larger(Vector a, Vector b) { return b > a ? b : a; }
INLINE Vector smaller(Vector a, Vector b) { return b < a ? b : a; }

// Within two units in the last place; 0 below −87, NaN stays.
INLINE Vector exponential(Vector x) {
    const Vector bounded = x > all(88.0f) ? all(88.0f) : x;
    const Vector magic = all(12582912.0f);  // adding it rounds to an integer
    const Vector n = (bounded * 1.44269504f + magic) - magic;
    const Vector r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Vector within = x < all(-87.0f) ? all(0.0f) : n;  // a power that exists, also of −∞
    const Integers power = (__builtin_convertvector(within, Integers) + 127) << 23;
    return x < all(-87.0f) ? all(0.0f) : p * (Vector)power;
}

// log(1 + e^x), by 2·artanh(u / (2 + u)) for u = e^−|x|.
INLINE Vector softplus(Vector x) {
    const Vector u = exponential(x < all(0.0f) ? x : -x), s = u / (u + 2.0f), q = s * s;
    Vector p = all(1.0f / 15);
    p = p * q + 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 0.2f;
    p = p * q + 1.0f / 3;
    p = p * q + 1.0f;
    return (x < all(0.0f) ? all(0.0f) : x) + 2.0f * s * p;
}

// Lanes moved by half, a quarter … of the vector.
#if defined(__clang__) || __GNUC__ >= 12
#define MOVED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define MOVED(x, ...) __builtin_shuffle(x, (Integers){__VA_ARGS__})
#endif
#if LANES == 16
#define FOLDED(x, combine)                                                     \
    x = combine(x, MOVED(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
    x = combine(x, MOVED(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
    x = combine(x, MOVED(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
    x = combine(x, MOVED(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))
#elif LANES == 8
#define FOLDED(x, combine)                              \
    x = combine(x, MOVED(x, 4, 5, 6, 7, 0, 1, 2, 3)); \
    x = combine(x, MOVED(x, 2, 3, 0, 1, 6, 7, 4, 5)); \
    x = combine(x, MOVED(x, 1, 0, 3, 2, 5, 4, 7, 6))
#else
#define FOLDED(x, combine)                  \
    x = combine(x, MOVED(x, 2, 3, 0, 1)); \
    x = combine(x, MOVED(x, 1, 0, 3, 2))
#endif

INLINE Vector added(Vector a, Vector b) { return a + b; }

INLINE float sum_of(Vector x) {
    FOLDED(x, added);
    return x[0];
}

INLINE float largest_of(Vector x) {
    FOLDED(x, larger);
    return x[0];
}
