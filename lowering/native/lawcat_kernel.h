// The kernel of lawcat.h; kernels.cpp includes this once for each processor, after vectors.h, with ROWS and COLUMNS (of a
// register tile of a product) defined too.
//
// Arrays of a block are padded to whole vectors: `padded` is the head size rounded up.

constexpr int64_t kBlock = 32, kQueries = 16;  // tokens of a block; queries that read keys together
constexpr int64_t kAhead = 6;

// M rows by N vectors of c = a · b + bias (null: 0).
template <int M, int N>
INLINE void tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, const float* bias, float* c,
                 int64_t c_row) {
    Vector total[M][N];
    for (int n = 0; n < N; n++) {
        const Vector first = bias == nullptr ? all(0.0f) : load(bias + n * LANES);
        for (int m = 0; m < M; m++) total[m][n] = first;
    }
    for (int64_t k = 0; k < depth; k++, b += b_row) {
        Vector row[N];
        for (int n = 0; n < N; n++) row[n] = load(b + n * LANES);
        for (int m = 0; m < M; m++) {
            const Vector x = all(a[m * a_row + k]);
            for (int n = 0; n < N; n++) total[m][n] += x * row[n];
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(c + m * c_row + n * LANES, total[m][n]);
}

template <int N>
TARGET void columns(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t rows, int64_t depth,
                    const float* bias, float* c, int64_t c_row) {
    int64_t m = 0;
    for (; m + ROWS <= rows; m += ROWS) tile<ROWS, N>(a + m * a_row, a_row, b, b_row, depth, bias, c + m * c_row, c_row);
    for (; m < rows; m++) tile<1, N>(a + m * a_row, a_row, b, b_row, depth, bias, c + m * c_row, c_row);
}

// c [rows, vectors] = a [rows, depth] · b [depth, vectors] + bias.
TARGET void product(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t rows, int64_t depth,
                    int64_t vectors, const float* bias, float* c, int64_t c_row) {
    for (int64_t n = 0; n < vectors;) {
        const int64_t left = vectors - n, at = n * LANES;
        const float* some = bias == nullptr ? nullptr : bias + at;
        if (left >= COLUMNS) {
            columns<COLUMNS>(a, a_row, b + at, b_row, rows, depth, some, c + at, c_row);
            n += COLUMNS;
        } else if (left >= 4 && COLUMNS > 4) {
            columns<(COLUMNS > 4 ? 4 : 1)>(a, a_row, b + at, b_row, rows, depth, some, c + at, c_row);
            n += 4;
        } else if (left >= 2) {
            columns<2>(a, a_row, b + at, b_row, rows, depth, some, c + at, c_row);
            n += 2;
        } else {
            columns<1>(a, a_row, b + at, b_row, rows, depth, some, c + at, c_row);
            n += 1;
        }
    }
}

// Dot products of M tokens and N rows of the projection.
template <int M, int N>
INLINE void dots(const float* x, int64_t width, const float* weight, float* to, int64_t to_row) {
    Vector total[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) total[m][n] = all(0.0f);
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES)
        for (int n = 0; n < N; n++) {
            const Vector w = load(weight + n * width + k);
            for (int m = 0; m < M; m++) total[m][n] += w * load(x + m * width + k);
        }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            float sum = sum_of(total[m][n]);
            for (int64_t rest = k; rest < width; rest++) sum += weight[n * width + rest] * x[m * width + rest];
            to[m * to_row + n] = sum;
        }
}

TARGET void project(Call& c, int64_t first, int64_t last) {
    constexpr int kSide = LANES == 16 ? 4 : 2;  // tokens, and rows of the projection, in registers
    const int64_t row = c.projected_row(), width = c.width;
    for (int64_t t = first; t < last;) {
        const int64_t some = t + kSide <= last ? kSide : 1;
        float* to = c.projected.data() + t * row;
        const float *x = c.hidden + t * width, *weight = c.projection;
        for (int64_t n = 0; n < row;) {
            const int64_t rows = some == kSide && n + kSide <= row ? kSide : 1;
            if (rows == kSide)
                dots<kSide, kSide>(x, width, weight + n * width, to + n, row);
            else if (some == kSide)
                dots<kSide, 1>(x, width, weight + n * width, to + n, row);
            else
                dots<1, 1>(x, width, weight + n * width, to + n, row);
            n += rows;
        }
        for (const float* end = to + some * row; to < end; to += row)
            for (int64_t i = 0; i < 2 * c.heads; i += LANES) {
                float part[LANES] = {};
                const int64_t count = 2 * c.heads - i < LANES ? 2 * c.heads - i : LANES;
                for (int64_t j = 0; j < count; j++) part[j] = to[c.rank + i + j] + c.mix_bias[i + j];
                store(part, 1.0f / (1.0f + exponential(-load(part))));
                for (int64_t j = 0; j < count; j++) to[c.rank + i + j] = part[j];
            }
        t += some;
    }
}

// Scratch of one head for blocks of up to `block` tokens.
struct Scratch {
    int64_t group, size, padded, tiles, block, history, span, entry;
    float *conv, *taps, *map, *map_bias, *up, *up_bias, *packed, *state, *normal, *rows, *logits, *factors, *shares, *far,
        *weight, *turned, *keys, *values, *real, *scores, *near, *bias;
    std::vector<float> memory;

    TARGET Scratch(const Call& c, int64_t tokens)
        : group(c.group()), size(c.size), padded((c.size + LANES - 1) / LANES * LANES), tiles(2 * padded / LANES),
          block(tokens < kBlock ? tokens : kBlock), history(c.taps_count - 1),
          span((c.window - 1 + block + kQueries + 2 * LANES - 1) / LANES * LANES), entry((2 + group) * LANES) {
        const int64_t many = block * (group + 1) * padded;
        float** parts[] = {&conv, &taps, &map, &map_bias, &up, &up_bias, &packed, &state, &normal, &rows, &logits,
                           &factors, &shares, &far, &weight, &turned, &keys, &values, &real, &scores, &near, &bias};
        const int64_t lengths[] = {(group + 1) * (history + block) * padded, c.taps_count * (group + 1) * padded,
                                   size * padded, padded, c.rank * 2 * padded, 2 * padded, tiles * block * entry,
                                   2 * padded * padded, 2 * padded, many, many, block * 2 * padded, kQueries * group,
                                   block * group * padded, block * group * LANES, block * group * padded, size * span,
                                   span * padded, span, kQueries * group * span, kQueries * group * padded, span};
        int64_t total = 16;
        for (int64_t length : lengths) total += (length + 15) / 16 * 16;
        memory.assign(total, 0.0f);
        float* at = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / 4;
        for (std::size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
            *parts[i] = at;
            at += (lengths[i] + 15) / 16 * 16;
        }
    }
};

// Where one key head and its query heads begin.
struct Head {
    const Call& c;
    int64_t row, head, first;  // first: the row's first token, counted over the batch

    const float* query(int64_t t, int64_t g) const {
        return c.qkv + (first + t) * c.qkv_row() + (head * c.group() + g) * c.size;
    }
    const float* key(int64_t t) const { return c.qkv + (first + t) * c.qkv_row() + (c.heads + head) * c.size; }
    const float* value(int64_t t) const { return key(t) + c.kv_heads * c.size; }
    int64_t channel(int64_t slot) const {  // of a query head (slot < group) or the key head (slot = group)
        return slot < c.group() ? (head * c.group() + slot) * c.size : (c.heads + head) * c.size;
    }
    const float* input(int64_t t, int64_t slot) const { return slot < c.group() ? query(t, slot) : key(t); }
};

// The rotary embedding, scaled.
INLINE void turn(const float* x, const float* cosine, const float* sine, int64_t size, float scale, float* to) {
    const int64_t half = size / 2;
    int64_t d = 0;
    for (; d + LANES <= half; d += LANES) {
        const Vector first = load(x + d), second = load(x + d + half);
        store(to + d, (first * load(cosine + d) - second * load(sine + d)) * scale);
        store(to + d + half, (second * load(cosine + d + half) + first * load(sine + d + half)) * scale);
    }
    for (; d < half; d++) {
        to[d] = (x[d] * cosine[d] - x[d + half] * sine[d]) * scale;
        to[d + half] = (x[d + half] * cosine[d + half] + x[d] * sine[d + half]) * scale;
    }
}

// A query or key as the convolutions read it, 0 at padding.
INLINE void convolved(const Head& h, int64_t t, int64_t slot, float* to) {
    const Call& c = h.c;
    const float *x = h.input(t, slot), real = c.mask[h.first + t];
    if (c.rotated) {
        turn(x, c.cosine + (h.first + t) * c.size, c.sine + (h.first + t) * c.size, c.size, real, to);
        return;
    }
    int64_t d = 0;
    for (; d + LANES <= c.size; d += LANES) store(to + d, load(x + d) * real);
    for (; d < c.size; d++) to[d] = x[d] * real;
}

// Copies of weights and states, each padded to whole vectors.
TARGET void prepare(const Head& h, Scratch& s) {
    const Call& c = h.c;
    const int64_t channels = c.channels(), size = c.size;
    const float* state = c.past_state + h.row * c.state_row();
    for (int64_t slot = 0; slot <= s.group; slot++) {
        const int64_t channel = h.channel(slot);
        for (int64_t tap = 0; tap < c.taps_count; tap++)
            std::copy_n(c.taps + tap * channels + channel, size, s.taps + (slot * c.taps_count + tap) * s.padded);
        for (int64_t j = 0; j < s.history; j++)
            for (int64_t d = 0; d < size; d++)
                s.conv[(slot * (s.history + s.block) + j) * s.padded + d] =
                    c.past_conv[(h.row * channels + channel + d) * s.history + j];
    }
    for (int64_t i = 0; i < size; i++)
        std::copy_n(c.map_weight + (h.head * size + i) * size, size, s.map + i * s.padded);
    std::copy_n(c.map_bias + h.head * size, size, s.map_bias);
    for (int64_t half = 0; half < 2; half++) {
        const int64_t column = (h.head * 2 + half) * size;
        for (int64_t r = 0; r < c.rank; r++)
            std::copy_n(c.gate_up + r * c.kv_heads * 2 * size + column, size, s.up + (r * 2 + half) * s.padded);
        std::copy_n(c.gate_bias + column, size, s.up_bias + half * s.padded);
        for (int64_t i = 0; i < size; i++) {
            const float* from = state + (column + i) * (size + 1);
            std::copy_n(from, size, s.state + (half * s.padded + i) * s.padded);
            s.normal[half * s.padded + i] = from[size];
        }
    }
    const float* cache = state + c.state_numbers() + h.head * size;
    for (int64_t j = 0; j < c.window - 1; j++, cache += c.cache_row()) {
        for (int64_t d = 0; d < size; d++) s.keys[d * s.span + j] = cache[d];
        std::copy_n(cache + c.kv_heads * size, size, s.values + j * s.padded);
        s.real[j] = c.past_real[h.row * (c.window - 1) + j];
    }
}

// Features and factors of a block into `packed`: for each LANES rows of the state, each token: factors, keys, queries.
TARGET void features(const Head& h, Scratch& s, int64_t from, int64_t count) {
    const Call& c = h.c;
    const int64_t slots = s.group + 1, vectors = s.padded / LANES, length = s.history + s.block;
    for (int64_t slot = 0; slot < slots; slot++) {
        float* extended = s.conv + slot * length * s.padded;
        for (int64_t t = 0; t < count; t++) convolved(h, from + t, slot, extended + (s.history + t) * s.padded);
        for (int64_t t = 0; t < count; t++)
            for (int64_t n = 0; n < vectors; n++) {
                Vector sum = all(0.0f);
                for (int64_t tap = 0; tap < c.taps_count; tap++)
                    sum += load(extended + (t + tap) * s.padded + n * LANES) *
                           load(s.taps + (slot * c.taps_count + tap) * s.padded + n * LANES);
                store(s.rows + (t * slots + slot) * s.padded + n * LANES, sum);
            }
        std::memmove(extended, extended + count * s.padded, s.history * s.padded * sizeof(float));
    }
    product(s.rows, s.padded, s.map, s.padded, count * slots, c.size, vectors, s.map_bias, s.logits, s.padded);
    Vector inside = all(0.0f);  // the last vector's lanes that are features
    for (int64_t i = 0; i < LANES; i++) inside[i] = c.size - (vectors - 1) * LANES > i ? 1.0f : 0.0f;
    for (int64_t t = 0; t < count; t++)
        for (int64_t slot = 0; slot < slots; slot++) {
            float* y = s.logits + (t * slots + slot) * s.padded;
            Vector high = all(-3.4028234e38f), low = all(3.4028234e38f);
            for (int64_t n = 0; n < vectors; n++) {
                const Vector x = load(y + n * LANES);
                const bool edge = n + 1 == vectors;
                high = larger(high, edge ? (inside > all(0.5f) ? x : high) : x);
                low = smaller(low, edge ? (inside > all(0.5f) ? x : low) : x);
            }
            const float most = largest_of(high), least = -largest_of(-low);
            Vector plus = all(0.0f), minus = all(0.0f);
            float* to = s.packed + t * s.entry + (slot < s.group ? 2 + slot : 1) * LANES;
            const int64_t tile = s.block * s.entry;
            for (int64_t n = 0; n < vectors; n++) {
                const Vector x = load(y + n * LANES);
                Vector p = exponential(x - most), m = exponential(least - x);
                if (n + 1 == vectors) p = inside > all(0.5f) ? p : inside, m = inside > all(0.5f) ? m : inside;
                plus += p;
                minus += m;
                store(to + n * tile, p);
                store(to + (vectors + n) * tile, m);
            }
            const float real = slot < s.group ? 1.0f : c.mask[h.first + from + t];
            const float up = real / sum_of(plus), down = real / sum_of(minus);
            for (int64_t n = 0; n < vectors; n++) {
                store(to + n * tile, load(to + n * tile) * up);
                store(to + (vectors + n) * tile, load(to + (vectors + n) * tile) * down);
            }
        }
    const float* projected = c.projected.data() + (h.first + from) * c.projected_row();
    product(projected, c.projected_row(), s.up, 2 * s.padded, count, c.rank, 2 * vectors, s.up_bias, s.factors,
            2 * s.padded);
    const Vector least = all(c.lowest < 0.0f ? c.lowest : -3.4028234e38f);
    for (int64_t t = 0; t < count; t++) {
        const float slope = c.mask[h.first + from + t] / -c.temperature;
        for (int64_t n = 0; n < 2 * vectors; n++) {
            const Vector x = load(s.factors + t * 2 * s.padded + n * LANES);
            const Vector factor = slope == 0.0f ? all(1.0f) : exponential(larger(softplus(-x) * slope, least));
            store(s.packed + n * s.block * s.entry + t * s.entry, factor);
        }
    }
}

// LANES rows of the state by LANES columns, over a block, for G of the heads that read it.
template <int G>
INLINE void recur(const Scratch& s, const Head& h, int64_t row, int64_t column, int64_t head, int64_t count, bool keep) {
    Vector state[LANES];
    float* rows = s.state + row * LANES * s.padded + column;
    for (int r = 0; r < LANES; r++) state[r] = load(rows + r * s.padded);
    const float* packed = s.packed + row * s.block * s.entry;
    float* out = s.far + head * s.padded + column;
    const float* values = s.values + (h.c.window - 1) * s.padded + column;
    for (int64_t t = 0; t < count; t++, packed += s.entry, out += s.group * s.padded, values += s.padded) {
        const Vector value = load(values);
        const float *key = packed + LANES, *query = packed + (2 + head) * LANES;
        Vector total[G];
        for (int g = 0; g < G; g++) total[g] = row > 0 ? load(out + g * s.padded) : all(0.0f);
        for (int r = 0; r < LANES; r++) {
            state[r] = state[r] * packed[r] + value * key[r];
            for (int g = 0; g < G; g++) total[g] += state[r] * query[g * LANES + r];
        }
        for (int g = 0; g < G; g++) store(out + g * s.padded, total[g]);
    }
    if (keep)
        for (int r = 0; r < LANES; r++) store(rows + r * s.padded, state[r]);
}

TARGET void recurrence(const Head& h, Scratch& s, int64_t count) {
    for (int64_t row = 0; row < s.tiles; row++) {
        for (int64_t column = 0; column < s.padded; column += LANES)
            for (int64_t head = 0; head < s.group; head += 4) {
                const int64_t left = s.group - head;
                if (left >= 4) recur<4>(s, h, row, column, head, count, left == 4);
                if (left == 3) recur<3>(s, h, row, column, head, count, true);
                if (left == 2) recur<2>(s, h, row, column, head, count, true);
                if (left == 1) recur<1>(s, h, row, column, head, count, true);
            }
        Vector normal = load(s.normal + row * LANES);
        const float* packed = s.packed + row * s.block * s.entry;
        for (int64_t t = 0; t < count; t++, packed += s.entry) {
            normal = normal * load(packed) + load(packed + LANES);
            for (int64_t g = 0; g < s.group; g++) {
                float* weight = s.weight + (t * s.group + g) * LANES;
                const Vector before = row > 0 ? load(weight) : all(0.0f);
                store(weight, before + normal * load(packed + (2 + g) * LANES));
            }
        }
        store(s.normal + row * LANES, normal);
    }
}

// Softmax over the window, and both attentions by their shares into the output, for the queries of a block.
TARGET void window(const Head& h, Scratch& s, int64_t from, int64_t count) {
    const Call& c = h.c;
    const int64_t past = c.window - 1, vectors = s.padded / LANES;
    for (int64_t first = 0; first < count; first += kQueries) {
        const int64_t some = count - first < kQueries ? count - first : kQueries, seen = past + some;
        const int64_t wide = (seen + LANES - 1) / LANES;
        product(s.turned + first * s.group * s.padded, s.padded, s.keys + first, s.span, some * s.group, c.size, wide,
                nullptr, s.scores, s.span);
        for (int64_t i = 0; i < some; i++) {
            const int64_t token = h.first + from + first + i;
            for (int64_t g = 0; g < s.group; g++) {
                float* score = s.scores + (i * s.group + g) * s.span;
                if (c.softcap > 0.0f)
                    for (int64_t j = 0; j < seen; j++) score[j] = std::tanh(score[j] / c.softcap) * c.softcap;
                if (g == 0)
                    for (int64_t j = 0; j < wide * LANES; j++)
                        s.bias[j] = j >= i && j <= i + past && s.real[first + j] > 0.5f ? 1.0f : 0.0f;
                Vector high = all(-3.4028234e38f);
                for (int64_t j = 0; j < wide; j++) {
                    const Vector x = load(score + j * LANES);
                    high = larger(high, load(s.bias + j * LANES) > all(0.5f) ? x : high);
                }
                const float most = largest_of(high);
                Vector sum = all(0.0f);
                for (int64_t j = 0; j < wide; j++) {
                    const Vector p = exponential(load(score + j * LANES) - most);
                    const Vector seen_p = load(s.bias + j * LANES) > all(0.5f) ? p : all(0.0f);
                    sum += seen_p;
                    store(score + j * LANES, seen_p);
                }
                const float share = c.projected[token * c.projected_row() + c.rank + c.heads + h.head * s.group + g];
                s.shares[i * s.group + g] = share / sum_of(sum);
            }
        }
        product(s.scores, s.span, s.values + first * s.padded, s.padded, some * s.group, seen, vectors, nullptr, s.near,
                s.padded);
        for (int64_t i = 0; i < some; i++) {
            const int64_t token = h.first + from + first + i;
            float* out = c.output + (token * c.heads + h.head * s.group) * c.size;
            if (c.mask[token] == 0.0f) {
                std::fill_n(out, s.group * c.size, 0.0f);
                continue;
            }
            for (int64_t g = 0; g < s.group; g++, out += c.size) {
                const int64_t at = (first + i) * s.group + g;
                const float share = c.projected[token * c.projected_row() + c.rank + h.head * s.group + g];
                const float near_share = s.shares[i * s.group + g];
                const float far_share = share / (sum_of(load(s.weight + at * LANES)) + 1e-10f);
                const float *far = s.far + at * s.padded, *near = s.near + (i * s.group + g) * s.padded;
                int64_t d = 0;
                for (; d + LANES <= c.size; d += LANES)
                    store(out + d, load(far + d) * far_share + load(near + d) * near_share);
                for (; d < c.size; d++) out[d] = far[d] * far_share + near[d] * near_share;
            }
        }
    }
}

TARGET void head(const Call& c, int64_t row, int64_t kv_head) {
    const Head h{c, row, kv_head, row * c.tokens};
    Scratch s(c, c.tokens);
    prepare(h, s);
    const int64_t past = c.window - 1, size = c.size;
    // The windows before this chunk, which a short chunk keeps in part; the state itself may be overwritten below.
    std::vector<float> old(past * 2 * size), old_conv((s.group + 1) * size * s.history);
    const float* cache = c.past_state + row * c.state_row() + c.state_numbers() + kv_head * size;
    for (int64_t j = 0; j < past; j++)
        for (int64_t half = 0; half < 2; half++)
            std::copy_n(cache + j * c.cache_row() + half * c.kv_heads * size, size, &old[(j * 2 + half) * size]);
    for (int64_t slot = 0; slot <= s.group; slot++)
        std::copy_n(c.past_conv + (row * c.channels() + h.channel(slot)) * s.history, size * s.history,
                    old_conv.data() + slot * size * s.history);
    std::vector<float> key(size);
    for (int64_t from = 0; from < c.tokens; from += s.block) {
        const int64_t count = c.tokens - from < s.block ? c.tokens - from : s.block;
        for (int64_t t = 0; t < count; t++) {
            const float *cosine = c.cosine + (h.first + from + t) * size, *sine = c.sine + (h.first + from + t) * size;
            for (int64_t d = 0; d < size; d += 16) {  // the rows of tokens are far apart: fetched some tokens ahead
                for (int64_t slot = 0; slot <= s.group; slot++)
                    __builtin_prefetch(h.input(from + t, slot) + kAhead * c.qkv_row() + d);
                __builtin_prefetch(h.value(from + t) + kAhead * c.qkv_row() + d);
            }
            for (int64_t g = 0; g < s.group; g++)
                turn(h.query(from + t, g), cosine, sine, size, c.scale, s.turned + (t * s.group + g) * s.padded);
            turn(h.key(from + t), cosine, sine, size, 1.0f, key.data());
            for (int64_t d = 0; d < size; d++) s.keys[d * s.span + past + t] = key[d];
            std::copy_n(h.value(from + t), size, s.values + (past + t) * s.padded);
            s.real[past + t] = c.mask[h.first + from + t];
        }
        for (int64_t t = count; t < s.span - past; t++) s.real[past + t] = 0.0f;
        features(h, s, from, count);
        recurrence(h, s, count);
        window(h, s, from, count);
        for (int64_t d = 0; d < size; d++)
            std::memmove(s.keys + d * s.span, s.keys + d * s.span + count, past * sizeof(float));
        std::memmove(s.values, s.values + count * s.padded, past * s.padded * sizeof(float));
        std::memmove(s.real, s.real + count, past * sizeof(float));
    }
    float* state = c.present_state + row * c.state_row();
    for (int64_t half = 0; half < 2; half++)
        for (int64_t i = 0; i < size; i++) {
            float* to = state + ((kv_head * 2 + half) * size + i) * (size + 1);
            std::copy_n(s.state + (half * s.padded + i) * s.padded, size, to);
            to[size] = s.normal[half * s.padded + i];
        }
    const int64_t last = c.last[row];
    float* window_to = state + c.state_numbers() + kv_head * size;
    for (int64_t j = 0; j < past; j++, window_to += c.cache_row()) {
        const int64_t t = last + j - past;
        float* value_to = window_to + c.kv_heads * size;
        if (t < 0) {
            std::copy_n(&old[(last + j) * 2 * size], size, window_to);
            std::copy_n(&old[((last + j) * 2 + 1) * size], size, value_to);
            continue;
        }
        turn(h.key(t), c.cosine + (h.first + t) * size, c.sine + (h.first + t) * size, size, 1.0f, window_to);
        std::copy_n(h.value(t), size, value_to);
    }
    for (int64_t slot = 0; slot <= s.group; slot++)
        for (int64_t j = 0; j < s.history; j++) {
            const int64_t t = last + j - s.history;
            if (t >= 0) convolved(h, t, slot, key.data());
            for (int64_t d = 0; d < size; d++)
                c.present_conv[(row * c.channels() + h.channel(slot) + d) * s.history + j] =
                    t < 0 ? old_conv[(slot * size + d) * s.history + last + j] : key[d];
        }
}
