// One step of a LLaMA-shaped decoder over T tokens of S sequences, parts of prompts and next tokens
// alike: weights of 4 or 8 bits, activations of 8 bits (per block of 32), everything else in float32.
// Built by native.py on first use; the PyTorch path is its twin.
//
// Every token is computed by the same operations in the same order, whatever else the step holds: what
// is drawn for a sequence depends on its own tokens alone, bit by bit.
//
// A matrix is kept in tiles of 16 rows × 32 columns (a block), column blocks of a tile one after
// another, so that a vector register holds 16 rows and the inputs are broadcast:
//
//   4 bits: 4 × 64 bytes. Byte 4r + c of part p is row r, its low half column 4p + c, its high half
//           column 4(p + 4) + c.            8 bits: 8 × 64 bytes, byte 4r + c of part p: column 4p + c.
//   then 16 scales and 16 minimums, float16:  weight = scale · code + minimum.
//
// With x ≈ s · a (a int8) a block's part of the product is scale · s · Σ code·a + minimum · s · Σ a:
// Σ code·a is what VNNI (or AVX2's byte products) makes of unsigned codes and signed inputs.
//
// A page of the cache keeps keys as [KV, D, page_tokens], so that a register holds one dimension of 16
// keys, and values as [KV, page_tokens, D].

#include <omp.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vector.h"

namespace {

// GROUP tokens share a pass over the weights, QUERIES one over the keys, MIXES one over the values.
constexpr int TILE = 16, BLOCK = 32, GROUP = REGISTERS / 4, QUERIES = REGISTERS / 4, MIXES = REGISTERS / 8;

struct Matrix {
    const uint8_t* tiles;
    const float* bias;  // or null
    int64_t rows, columns, bits;
};

struct Layer {
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm;  // the last two or null
    Matrix qkv, o, gate_up, down;                               // gate and up: tiles in turn
    void *keys, *values;                                        // pages of the cache
    float* scales;                                              // [pages, 2, KV, page_tokens] of int8
    int64_t window;                                             // 0: all
};

struct Model {
    int64_t hidden, heads, kv_heads, head_dim, ffn, vocab, layers, page_tokens;
    int64_t cache_bytes;  // of a number in the cache: 4 float32, 2 bfloat16, 1 int8
    float eps, scale;
    const Layer* layer;
    const float* norm;
    Matrix head;
};

// What a step computes. Rows of one sequence follow one another.
struct Batch {
    int64_t rows, sequences, most, wanted, context, threads;
    float* x;                    // [rows, hidden] embeddings, overwritten
    const float *cos, *sin;      // [rows, D]
    const int64_t* positions;    // [rows]
    const int64_t* slots;        // [rows] where keys and values go
    const int64_t* firsts;       // [sequences + 1] first row of each
    const int64_t* pages;        // [sequences, most]
    const int64_t* wants;        // [wanted] rows whose logits are wanted
    float* logits;               // [wanted, vocab]
    char* scratch;
};

// --- products ---------------------------------------------------------------------------------------

// Inputs of rows in int8: those of a group lie side by side, [group, block, 8, GROUP, 4], and for each
// block their scales and their scale · Σ codes, [group, block, 2, GROUP].
struct Inputs {
    int8_t* codes;
    float* scales;
    int8_t* codes_of(int64_t group, int64_t columns) const { return codes + group * columns * GROUP; }
    float* scales_of(int64_t group, int64_t columns) const {
        return scales + group * (columns / BLOCK) * 2 * GROUP;
    }
};

void quantise(const float* x, int64_t columns, Inputs in, int64_t row) {
    const int64_t n = row % GROUP;
    int8_t* codes = in.codes_of(row / GROUP, columns) + 4 * n;
    float* scales = in.scales_of(row / GROUP, columns) + n;
    for (int64_t b = 0; b < columns / BLOCK; b++) {
        const F first = load(x + b * BLOCK), second = load(x + b * BLOCK + 16);
        const float top = peak(most(size(first), size(second)));
        const float scale = top / 127.f;
        const F by = all(scale < FLT_MIN ? 0.f : 127.f / top);
        int8_t bytes[BLOCK];
        const int32_t total = sum(keep_bytes(bytes, mul(first, by))) +
                              sum(keep_bytes(bytes + 16, mul(second, by)));
        for (int p = 0; p < 8; p++) std::memcpy(codes + (b * 8 + p) * 4 * GROUP, bytes + 4 * p, 4);
        scales[b * 2 * GROUP] = scale;
        scales[b * 2 * GROUP + GROUP] = scale * total;
    }
}

inline int32_t four(const int8_t* p) {
    int32_t found;
    std::memcpy(&found, p, 4);
    return found;
}

template <int N, int BITS>  // N rows of inputs at a time
inline void tile(const uint8_t* w, int64_t blocks, const int8_t* codes, const float* scales, F* to) {
    F y[N];  // not `to`: what another pointer might reach is written each time
    for (int n = 0; n < N; n++) y[n] = zero();
    for (int64_t b = 0; b < blocks; b++) {
        I sums[N];
        for (int n = 0; n < N; n++) sums[n] = none();
        for (int p = 0; p < BITS; p++) {
            const C raw = bytes(w + 64 * p), low = BITS == 8 ? raw : low_half(raw);
            for (int n = 0; n < N; n++)
                sums[n] = dot<BITS>(sums[n], low, four(codes + 4 * (p * GROUP + n)));
            if (BITS == 4) {
                const C high = high_half(raw);
                for (int n = 0; n < N; n++)
                    sums[n] = dot<BITS>(sums[n], high, four(codes + 4 * ((p + 4) * GROUP + n)));
            }
        }
        w += 64 * BITS;
        const F scale = halves(w), minimum = halves(w + 32);
        w += 64;
        for (int n = 0; n < N; n++) {
            y[n] = fma(floats(sums[n]), mul(scale, all(scales[n])), y[n]);
            y[n] = fma(minimum, all(scales[GROUP + n]), y[n]);
        }
        codes += BLOCK * GROUP, scales += 2 * GROUP;
    }
    for (int n = 0; n < N; n++) to[n] = y[n];
}

template <int BITS, int N = GROUP>
inline void tiles(const uint8_t* w, int64_t blocks, int count, const int8_t* codes,
                  const float* scales, F* y) {
    if constexpr (N > 1)
        if (count < N) return tiles<BITS, N - 1>(w, blocks, count, codes, scales, y);
    tile<N, BITS>(w, blocks, codes, scales, y);
}

// Rows 16t to 16t + 15 of the matrix times `count` inputs of a group.
inline void tiles(const Matrix& m, int64_t t, int count, Inputs in, int64_t group, F* y) {
    const int64_t blocks = m.columns / BLOCK;
    const uint8_t* w = m.tiles + t * blocks * (64 * m.bits + 64);
    const int8_t* codes = in.codes_of(group, m.columns);
    const float* scales = in.scales_of(group, m.columns);
    if (m.bits == 4) tiles<4>(w, blocks, count, codes, scales, y);
    else tiles<8>(w, blocks, count, codes, scales, y);
    if (m.bias)
        for (int n = 0; n < count; n++) y[n] = add(y[n], load(m.bias + t * TILE));
}

inline int in_group(int64_t rows, int64_t group) {
    const int64_t left = rows - group * GROUP;
    return left < GROUP ? int(left) : GROUP;
}

// This thread's part of y[row] (+)= matrix · inputs[row].
void multiply(const Matrix& m, Inputs in, int64_t rows, float* y, int64_t stride, bool onto, int me,
              int team) {
    const int64_t count = m.rows / TILE;
    for (int64_t t = count * me / team; t < count * (me + 1) / team; t++)
        for (int64_t group = 0; group * GROUP < rows; group++) {
            const int N = in_group(rows, group);
            F out[GROUP];
            tiles(m, t, N, in, group, out);
            for (int n = 0; n < N; n++) {
                float* to = y + (group * GROUP + n) * stride + t * TILE;
                keep(to, onto ? add(load(to), out[n]) : out[n]);
            }
        }
}

void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* y) {
    F squares = zero();
    for (int64_t i = 0; i < count; i += 16) squares = fma(load(x + i), load(x + i), squares);
    const F by = all(1.f / std::sqrt(sum(squares) / count + eps));
    for (int64_t i = 0; i < count; i += 16) keep(y + i, mul(mul(load(x + i), by), load(weight + i)));
}

// --- attention --------------------------------------------------------------------------------------

// Half style: i turns with i + D/2; sin comes negated in its first half.
void rotate(float* x, const float* cos, const float* sin, int64_t D) {
    const int64_t half = D / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] + b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

inline float scale_of(const float* x, int64_t D) {  // of a head's numbers in int8
    F top = zero();
    for (int64_t d = 0; d < D; d += 16) top = most(top, size(load(x + d)));
    const float scale = peak(top) / 127.f;
    return scale < FLT_MIN ? 0 : scale;  // 1 / scale would be infinite, or nearly so
}

// k and v [KV, D] into their slot.
template <typename T>
void put(const Model& m, const Layer& layer, int64_t slot, const float* k, const float* v) {
    const int64_t D = m.head_dim, P = m.page_tokens, page = slot / P, at = slot % P;
    for (int64_t h = 0; h < m.kv_heads; h++, k += D, v += D) {
        T* keys = (T*)layer.keys + (page * m.kv_heads + h) * D * P + at;
        T* values = (T*)layer.values + ((page * m.kv_heads + h) * P + at) * D;
        float key_by = 1, value_by = 1;
        if (sizeof(T) == 1) {
            const float key_scale = scale_of(k, D), value_scale = scale_of(v, D);
            layer.scales[((page * 2) * m.kv_heads + h) * P + at] = key_scale;
            layer.scales[((page * 2 + 1) * m.kv_heads + h) * P + at] = value_scale;
            key_by = key_scale > 0 ? 1 / key_scale : 0, value_by = value_scale > 0 ? 1 / value_scale : 0;
        }
        for (int64_t d = 0; d < D; d += 16) {
            T some[16];
            keep(some, mul(load(k + d), all(key_by)));
            for (int i = 0; i < 16; i++) keys[(d + i) * P] = some[i];
            keep(values + d, mul(load(v + d), all(value_by)));
        }
    }
}

// Up to QUERIES heads that share the keys of one head, of tokens that follow one another.
struct Asking {
    const int64_t* pages;
    int64_t kv, count, first, last;  // of all: they look at first … last − 1
    const float* q[QUERIES];
    float* y[QUERIES];
    int64_t from[QUERIES], to[QUERIES];  // each one's own
};

template <int N, typename T>
inline void score(const T* keys, int64_t D, int64_t P, const float* q, F* to) {
    F scores[N];
    for (int n = 0; n < N; n++) scores[n] = zero();
    for (int64_t d = 0; d < D; d++, q += QUERIES) {
        const F k = load(keys + d * P);
        for (int n = 0; n < N; n++) scores[n] = fma(all(q[n]), k, scores[n]);
    }
    for (int n = 0; n < N; n++) to[n] = scores[n];
}

template <typename T, int N = QUERIES>
inline void score_some(int64_t count, const T* keys, int64_t D, int64_t P, const float* q, F* scores) {
    if constexpr (N > 1)
        if (count < N) return score_some<T, N - 1>(count, keys, D, P, q, scores);
    score<N, T>(keys, D, P, q, scores);
}

// y[n] = Σ weights[n][i] · values[i], dimensions d to d + 16·PARTS, for N queries.
template <int N, int PARTS, typename T>
inline void mix(const Model& m, const Layer& layer, const Asking& a, int64_t d, const float* weights,
                int64_t stride, float* const* y) {
    const int64_t D = m.head_dim, P = m.page_tokens;
    F sums[N][PARTS];
    for (int n = 0; n < N; n++)
        for (int p = 0; p < PARTS; p++) sums[n][p] = zero();
    for (int64_t i = a.first; i < a.last;) {
        const int64_t end = (i / P + 1) * P < a.last ? (i / P + 1) * P : a.last;
        const T* v = (const T*)layer.values + ((a.pages[i / P] * m.kv_heads + a.kv) * P + i % P) * D + d;
        for (; i < end; i++, v += D) {
            F part[PARTS];
            for (int p = 0; p < PARTS; p++) part[p] = load(v + 16 * p);
            for (int n = 0; n < N; n++)
                for (int p = 0; p < PARTS; p++)
                    sums[n][p] = fma(all(weights[n * stride + i]), part[p], sums[n][p]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int p = 0; p < PARTS; p++) keep(y[n] + d + 16 * p, sums[n][p]);
}

template <typename T, int PARTS, int N = MIXES>
inline void mix_some(int64_t count, const Model& m, const Layer& layer, const Asking& a, int64_t d,
                     const float* weights, int64_t stride, float* const* y) {
    if constexpr (N > 1)
        if (count < N) return mix_some<T, PARTS, N - 1>(count, m, layer, a, d, weights, stride, y);
    mix<N, PARTS, T>(m, layer, a, d, weights, stride, y);
}

// scratch: floats, QUERIES · (D + context + 32)
template <typename T>
void attend(const Model& m, const Layer& layer, const Asking& a, int64_t context, float* scratch) {
    const int64_t D = m.head_dim, P = m.page_tokens, count = a.count;
    const int64_t begin = a.first / 16 * 16, stride = (context + 31) / 16 * 16;
    float* q = scratch;  // [D, QUERIES], scaled
    float* scores = scratch + D * QUERIES;  // [QUERIES, stride], by the token's place
    for (int64_t n = 0; n < count; n++)
        for (int64_t d = 0; d < D; d++) q[d * QUERIES + n] = a.q[n][d] * m.scale;
    F tops[QUERIES];
    for (int64_t n = 0; n < count; n++) tops[n] = all(-INFINITY);
    for (int64_t i = begin; i < a.last; i += 16) {
        const int64_t page = a.pages[i / P];
        F found[QUERIES];
        score_some<T>(count, (const T*)layer.keys + (page * m.kv_heads + a.kv) * D * P + i % P, D, P, q, found);
        for (int64_t n = 0; n < count; n++) {
            float* mine = scores + n * stride + i;
            if (sizeof(T) == 1)
                found[n] = mul(found[n], load(layer.scales + (page * 2 * m.kv_heads + a.kv) * P + i % P));
            keep(mine, found[n]);
            if (i < a.from[n] || i + 16 > a.to[n]) {
                for (int64_t j = 0; j < 16; j++)
                    if (i + j < a.from[n] || i + j >= a.to[n]) mine[j] = -INFINITY;
                found[n] = load(mine);
            }
            tops[n] = most(tops[n], found[n]);
        }
    }
    float totals[QUERIES];
    for (int64_t n = 0; n < count; n++) {
        const F top = all(peak(tops[n]));
        F total = zero();
        for (int64_t i = begin; i < a.last; i += 16) {
            float* mine = scores + n * stride + i;
            F weight = exponential(sub(load(mine), top));
            total = add(total, weight);
            if (sizeof(T) == 1)
                weight = mul(weight, load(layer.scales + ((a.pages[i / P] * 2 + 1) * m.kv_heads + a.kv) * P + i % P));
            keep(mine, weight);
        }
        totals[n] = sum(total);
    }
    for (int64_t n = 0; n < count; n += MIXES) {
        const int64_t some = count - n < MIXES ? count - n : MIXES;
        int64_t d = 0;
        for (; d + 64 <= D; d += 64)
            mix_some<T, 4>(some, m, layer, a, d, scores + n * stride, stride, a.y + n);
        for (; d < D; d += 16)
            mix_some<T, 1>(some, m, layer, a, d, scores + n * stride, stride, a.y + n);
    }
    for (int64_t n = 0; n < count; n++) {
        const F by = all(1.f / totals[n]);
        for (int64_t d = 0; d < D; d += 16) keep(a.y[n] + d, mul(load(a.y[n] + d), by));
    }
}

// This thread's part of all attention of a layer: q in qkv [rows, …], results in y [rows, wide].
template <typename T>
void attend_all(const Model& m, const Layer& layer, const Batch& batch, const float* qkv, int64_t QKV,
                float* y, int64_t wide, float* scratch, int me, int team) {
    const int64_t D = m.head_dim, each = m.heads / m.kv_heads;
    int64_t task = 0;
    for (int64_t s = 0; s < batch.sequences; s++) {
        const int64_t first = batch.firsts[s], asked = (batch.firsts[s + 1] - first) * each;
        for (int64_t kv = 0; kv < m.kv_heads; kv++)
            for (int64_t u = 0; u < asked; u += QUERIES) {
                if (task++ % team != me) continue;
                Asking a;
                a.pages = batch.pages + s * batch.most, a.kv = kv;
                a.count = asked - u < QUERIES ? asked - u : QUERIES;
                for (int64_t n = 0; n < a.count; n++) {
                    const int64_t row = first + (u + n) / each, head = kv * each + (u + n) % each;
                    a.q[n] = qkv + row * QKV + head * D, a.y[n] = y + row * wide + head * D;
                    a.to[n] = batch.positions[row] + 1;
                    a.from[n] = layer.window && a.to[n] > layer.window ? a.to[n] - layer.window : 0;
                }
                a.first = a.from[0], a.last = a.to[a.count - 1];
                attend<T>(m, layer, a, batch.context, scratch);
            }
    }
}

int64_t wide_of(const Model& m) {
    const int64_t widest = m.ffn > m.hidden ? m.ffn : m.hidden;
    return widest > m.heads * m.head_dim ? widest : m.heads * m.head_dim;
}

int64_t up64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

// Bytes of scratch memory that a step of so many rows needs, no sequence longer than `context`.
extern "C" int64_t herd_scratch(const Model* m, int64_t rows, int64_t context, int64_t threads) {
    const int64_t wide = wide_of(*m), qkv = (m->heads + 2 * m->kv_heads) * m->head_dim;
    const int64_t groups = (rows + GROUP - 1) / GROUP;
    const int64_t inputs = up64(groups * GROUP * wide) + up64(groups * GROUP * wide / BLOCK * 8);
    const int64_t own = 4 * (wide + QUERIES * (m->head_dim + context + 32));
    return up64(4 * rows * qkv) + up64(4 * rows * wide) + (threads + 1) * inputs + threads * up64(own);
}

extern "C" void herd_step(const Model* model, const Batch* given) {
    const Model& m = *model;
    const Batch& batch = *given;
    const int64_t rows = batch.rows, H = m.hidden, D = m.head_dim, wide = wide_of(m);
    const int64_t QD = m.heads * D, KD = m.kv_heads * D, QKV = QD + 2 * KD;
    const int64_t groups = (rows + GROUP - 1) / GROUP;
    // Few rows: each thread makes the inputs of all for itself, which is cheaper than to wait.
    const bool alone = rows <= GROUP;
    char* at = batch.scratch;
    const auto take = [&](int64_t bytes) { char* mine = at; at += up64(bytes); return mine; };
    float* qkv = (float*)take(4 * rows * QKV);
    float* mid = (float*)take(4 * rows * wide);
    char* rest = at;
    float* x = batch.x;
#pragma omp parallel num_threads(batch.threads)
    {
        const int me = omp_get_thread_num(), team = omp_get_num_threads();
        const int64_t codes = up64(groups * GROUP * wide), scales = up64(groups * GROUP * wide / BLOCK * 8);
        char* mine = rest + (alone ? me : 0) * (codes + scales);
        const Inputs in = {(int8_t*)mine, (float*)(mine + codes)};
        const int64_t own = up64(4 * (wide + QUERIES * (D + batch.context + 32)));
        float* normed = (float*)(rest + (batch.threads + 1) * (codes + scales) + me * own);
        float* scores = normed + wide;
        // The inputs of the next product: from[row], with a norm before where there is one. A group's
        // rows lie side by side in memory, so one thread makes them all.
        const auto prepare = [&](const float* from, int64_t stride, int64_t columns, const float* norm,
                                 int64_t count, const int64_t* which) {
            for (int64_t r = 0; r < count; r++) {
                if (!alone && r / GROUP % team != me) continue;
                const float* row = from + (which ? which[r] : r) * stride;
                if (norm) rms_norm(row, norm, columns, m.eps, normed);
                quantise(norm ? normed : row, columns, in, r);
            }
            if (!alone) {
#pragma omp barrier
            }
        };
        for (int64_t l = 0; l < m.layers; l++) {
            const Layer& layer = m.layer[l];
            prepare(x, H, H, layer.attention_norm, rows, nullptr);
            multiply(layer.qkv, in, rows, qkv, QKV, false, me, team);
#pragma omp barrier
            for (int64_t r = me; r < rows; r += team) {
                float* row = qkv + r * QKV;
                for (int64_t h = 0; h < m.heads + m.kv_heads; h++) {
                    const float* norm = h < m.heads ? layer.q_norm : layer.k_norm;
                    if (norm) rms_norm(row + h * D, norm, D, m.eps, row + h * D);
                    rotate(row + h * D, batch.cos + r * D, batch.sin + r * D, D);
                }
                const auto put_one = m.cache_bytes == 4 ? put<float> : m.cache_bytes == 2 ? put<uint16_t> : put<int8_t>;
                put_one(m, layer, batch.slots[r], row + QD, row + QD + KD);
            }
#pragma omp barrier
            const auto attend_some = m.cache_bytes == 4   ? attend_all<float>
                                     : m.cache_bytes == 2 ? attend_all<uint16_t>
                                                          : attend_all<int8_t>;
            attend_some(m, layer, batch, qkv, QKV, mid, wide, scores, me, team);
#pragma omp barrier
            prepare(mid, wide, QD, nullptr, rows, nullptr);
            multiply(layer.o, in, rows, x, H, true, me, team);
#pragma omp barrier
            prepare(x, H, H, layer.mlp_norm, rows, nullptr);
            const int64_t pairs = m.ffn / TILE;
            for (int64_t t = pairs * me / team; t < pairs * (me + 1) / team; t++)
                for (int64_t group = 0; group < groups; group++) {
                    const int N = in_group(rows, group);
                    F gate[GROUP], up[GROUP];
                    tiles(layer.gate_up, 2 * t, N, in, group, gate);
                    tiles(layer.gate_up, 2 * t + 1, N, in, group, up);
                    for (int n = 0; n < N; n++) {  // gate · σ(gate) · up
                        const F below = add(all(1.f), exponential(sub(zero(), gate[n])));
                        keep(mid + (group * GROUP + n) * wide + t * TILE, mul(div(gate[n], below), up[n]));
                    }
                }
#pragma omp barrier
            prepare(mid, wide, m.ffn, nullptr, rows, nullptr);
            multiply(layer.down, in, rows, x, H, true, me, team);
#pragma omp barrier
        }
        prepare(x, H, H, m.norm, batch.wanted, batch.wants);
        multiply(m.head, in, batch.wanted, batch.logits, m.vocab, false, me, team);
    }
}

// Blocks of 32 neighbours of a row, as files keep them, and the tiles that they are to become. For 4 bits
// byte i of a block holds value i in its low half and i + 16 in its high; for 8 bits they are signed.
struct Job {
    const uint8_t* codes;               // of row r and block b at codes + r · row_bytes + b · block_bytes
    int64_t row_bytes, block_bytes;
    const char* scales;                 // float16, as far apart as told
    int64_t scale_row, scale_block;
    const char* minimums;               // likewise
    int64_t minimum_row, minimum_block;
    const int64_t* order;               // which row of theirs each of ours is; null: the same one
    int64_t rows, blocks, bits;
    uint8_t* out;
    int64_t step;                       // bytes between the beginnings of two of our tiles
};

extern "C" void herd_pack(const Job* jobs, int64_t count, int64_t threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t j = 0; j < count; j++) {
        const Job& job = jobs[j];
        const uint32_t flip = job.bits == 8 ? 0x80808080u : 0;  // signed bytes become those from 0 to 255
        const int64_t size = (job.bits + 1) * 64;
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t t = 0; t < job.rows / TILE; t++)
            for (int64_t r = 0; r < TILE; r++) {
                const int64_t row = job.order ? job.order[t * TILE + r] : t * TILE + r;
                const uint8_t* codes = job.codes + row * job.row_bytes;
                const char* scale = job.scales + row * job.scale_row;
                const char* minimum = job.minimums + row * job.minimum_row;
                for (int64_t b = 0; b < job.blocks; b++) {
                    uint8_t* to = job.out + t * job.step + b * size;
                    for (int64_t p = 0; p < job.bits; p++) {
                        uint32_t word;
                        std::memcpy(&word, codes + 4 * p, 4);
                        word ^= flip;
                        std::memcpy(to + 64 * p + 4 * r, &word, 4);
                    }
                    std::memcpy(to + 64 * job.bits + 2 * r, scale, 2);
                    std::memcpy(to + 64 * job.bits + 32 + 2 * r, minimum, 2);
                    codes += job.block_bytes, scale += job.scale_block, minimum += job.minimum_block;
                }
            }
    }
}
