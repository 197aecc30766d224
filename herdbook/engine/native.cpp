// One decoding step of a LLaMA-shaped decoder for B sequences, weights of 4 or 8 bits, activations of
// 8 bits (per block of 32), everything else in float32. Built by native.py on first use; the PyTorch
// path is its twin.
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

#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vector.h"

namespace {

constexpr int TILE = 16, BLOCK = 32, GROUP = 4;  // GROUP: sequences that share a pass over the weights

struct Matrix {
    const uint8_t* tiles;
    const float* bias;  // or null
    int64_t rows, columns, bits;
};

struct Layer {
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm;  // the last two or null
    Matrix qkv, o, gate_up, down;                               // gate and up: tiles in turn
    void* cache;                                                // [pages, page_tokens, 2, KV, D]
    int64_t window;                                             // 0: all
};

struct Model {
    int64_t hidden, heads, kv_heads, head_dim, ffn, vocab, layers, page_tokens, bfloat_cache;
    float eps, scale;
    const Layer* layer;
    const float* norm;
    Matrix head;
};

// Inputs of one sequence as int8 with a scale per block.
struct Inputs {
    int8_t* codes;   // [columns]
    float* scales;   // [blocks]
    float* sums;     // [blocks] scale · Σ codes
};

void quantise(const float* x, int64_t columns, Inputs out) {
    for (int64_t b = 0; b < columns / BLOCK; b++) {
        const F first = load(x + b * BLOCK), second = load(x + b * BLOCK + 16);
        const float top = peak(most(size(first), size(second)));
        const float scale = top / 127.f;
        const F by = all(top > 0 ? 127.f / top : 0.f);
        const int32_t total = sum(keep_bytes(out.codes + b * BLOCK, mul(first, by))) +
                              sum(keep_bytes(out.codes + b * BLOCK + 16, mul(second, by)));
        out.scales[b] = scale;
        out.sums[b] = scale * total;
    }
}

inline int32_t four(const int8_t* p) {
    int32_t found;
    std::memcpy(&found, p, 4);
    return found;
}

template <int N, int BITS>  // N sequences at a time
inline void tile(const uint8_t* w, int64_t blocks, const Inputs* in, F* y) {
    for (int n = 0; n < N; n++) y[n] = zero();
    for (int64_t b = 0; b < blocks; b++) {
        I sums[N];
        for (int n = 0; n < N; n++) sums[n] = none();
        for (int p = 0; p < BITS; p++) {
            const C raw = bytes(w + 64 * p), codes = BITS == 8 ? raw : low_half(raw);
            for (int n = 0; n < N; n++)
                sums[n] = dot<BITS>(sums[n], codes, four(in[n].codes + b * BLOCK + 4 * p));
            if (BITS == 4) {
                const C high = high_half(raw);
                for (int n = 0; n < N; n++)
                    sums[n] = dot<BITS>(sums[n], high, four(in[n].codes + b * BLOCK + 16 + 4 * p));
            }
        }
        w += 64 * BITS;
        const F scale = halves(w), minimum = halves(w + 32);
        w += 64;
        for (int n = 0; n < N; n++) {
            y[n] = fma(floats(sums[n]), mul(scale, all(in[n].scales[b])), y[n]);
            y[n] = fma(minimum, all(in[n].sums[b]), y[n]);
        }
    }
}

template <int BITS>
inline void tiles(const uint8_t* w, int64_t blocks, int N, const Inputs* in, F* y) {
    switch (N) {
        case 1: return tile<1, BITS>(w, blocks, in, y);
        case 2: return tile<2, BITS>(w, blocks, in, y);
        case 3: return tile<3, BITS>(w, blocks, in, y);
        default: return tile<4, BITS>(w, blocks, in, y);
    }
}

// Rows 16t to 16t + 15 of the matrix times N inputs.
inline void tiles(const Matrix& m, int64_t t, int N, const Inputs* in, F* y) {
    const int64_t blocks = m.columns / BLOCK;
    const uint8_t* w = m.tiles + t * blocks * (64 * m.bits + 64);
    if (m.bits == 4) tiles<4>(w, blocks, N, in, y);
    else tiles<8>(w, blocks, N, in, y);
    if (m.bias)
        for (int n = 0; n < N; n++) y[n] = add(y[n], load(m.bias + t * TILE));
}

// This thread's part of y[b][row] (+)= matrix · x[b].
void multiply(const Matrix& m, const Inputs* in, int64_t B, float* y, int64_t stride, bool onto,
              int me, int threads) {
    const int64_t count = m.rows / TILE;
    for (int64_t t = count * me / threads; t < count * (me + 1) / threads; t++)
        for (int64_t b = 0; b < B; b += GROUP) {
            const int N = B - b < GROUP ? int(B - b) : GROUP;
            F out[GROUP];
            tiles(m, t, N, in + b, out);
            for (int n = 0; n < N; n++) {
                float* to = y + (b + n) * stride + t * TILE;
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

// Half style: i turns with i + D/2; sin comes negated in its first half.
void rotate(float* x, const float* cos, const float* sin, int64_t D) {
    for (int64_t i = 0; i < D / 2; i++) {
        const float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] + b * sin[i];
        x[i + D / 2] = b * cos[i + D / 2] + a * sin[i + D / 2];
    }
}

// One head of one sequence: q [D] looks at the tokens `first` to `last` of its pages.
template <typename T>
void attend(const Model& m, const T* cache, const int64_t* pages, int64_t first, int64_t last,
            int64_t kv, const float* q, float* scores, float* y) {
    const int64_t D = m.head_dim, token = 2 * m.kv_heads * D;
    const auto at = [&](int64_t i) {
        return cache + (pages[i / m.page_tokens] * m.page_tokens + i % m.page_tokens) * token + kv * D;
    };
    float top = -INFINITY;
    for (int64_t i = first; i < last; i++) {
        const T* k = at(i);
        F dot = zero();
        for (int64_t d = 0; d < D; d += 16) dot = fma(load(q + d), load(k + d), dot);
        const float score = sum(dot) * m.scale;
        scores[i - first] = score;
        top = score > top ? score : top;
    }
    const int64_t count = last - first;
    float total = 0;
    for (int64_t i = 0; i < count; i += 16) {
        keep(scores + i, exponential(sub(load(scores + i), all(top))));
        if (count - i < 16)
            for (int64_t j = count; j < i + 16; j++) scores[j] = 0;
        total += sum(load(scores + i));
    }
    for (int64_t d = 0; d < D; d += 64) {
        F mix[4] = {zero(), zero(), zero(), zero()};
        const int64_t parts = D - d >= 64 ? 4 : (D - d) / 16;
        for (int64_t i = first; i < last; i++) {
            const T* v = at(i) + m.kv_heads * D + d;
            const F weight = all(scores[i - first]);
            for (int64_t p = 0; p < parts; p++) mix[p] = fma(weight, load(v + 16 * p), mix[p]);
        }
        for (int64_t p = 0; p < parts; p++) keep(y + d + 16 * p, mul(mix[p], all(1.f / total)));
    }
}

template <typename T>
void put(const Model& m, T* cache, int64_t slot, const float* k, const float* v) {
    T* to = cache + slot * 2 * m.kv_heads * m.head_dim;
    const int64_t half = m.kv_heads * m.head_dim;
    for (int64_t i = 0; i < half; i += 16) keep(to + i, load(k + i));
    for (int64_t i = 0; i < half; i += 16) keep(to + half + i, load(v + i));
}

}  // namespace

// Bytes of scratch memory that a step of B sequences of at most `context` tokens needs.
extern "C" int64_t herd_scratch(const Model* m, int64_t B, int64_t context, int64_t threads) {
    const int64_t widest = m->ffn > m->hidden ? m->ffn : m->hidden;
    const int64_t wide = widest > m->heads * m->head_dim ? widest : m->heads * m->head_dim;
    const int64_t qkv = (m->heads + 2 * m->kv_heads) * m->head_dim;
    const int64_t floats = B * (m->hidden + qkv + 2 * wide + 2 * (wide / BLOCK)) +
                           threads * (context + 16);
    return 4 * floats + B * wide + B * (int64_t)sizeof(Inputs) + 4096;
}

// x [B, hidden] (the tokens' embeddings, overwritten), cos and sin [B, D], positions [B],
// pages [B, most], slots [B] → logits [B, vocab].
extern "C" void herd_step(const Model* model, int64_t B, float* x, const float* cos, const float* sin,
                          const int64_t* positions, const int64_t* pages, int64_t most,
                          const int64_t* slots, char* scratch, int64_t context, int64_t threads,
                          float* logits) {
    const Model& m = *model;
    const int64_t H = m.hidden, D = m.head_dim, QD = m.heads * D, KD = m.kv_heads * D;
    const int64_t QKV = QD + 2 * KD, each = m.heads / m.kv_heads;
    int64_t wide = m.ffn > H ? m.ffn : H;
    if (QD > wide) wide = QD;
    auto take = [&](int64_t bytes) {
        char* p = scratch;
        scratch += (bytes + 63) / 64 * 64;
        return p;
    };
    float* qkv = (float*)take(4 * B * QKV);
    float* mid = (float*)take(4 * B * wide);
    float* scores = (float*)take(4 * threads * (context + 16));
    float* scales = (float*)take(4 * B * (wide / BLOCK));
    float* sums = (float*)take(4 * B * (wide / BLOCK));
    int8_t* codes = (int8_t*)take(B * wide);
    Inputs* in = (Inputs*)take(B * sizeof(Inputs));
    for (int64_t b = 0; b < B; b++)
        in[b] = {codes + b * wide, scales + b * (wide / BLOCK), sums + b * (wide / BLOCK)};

#pragma omp parallel num_threads(threads)
    {
        const int me = omp_get_thread_num(), team = omp_get_num_threads();
        // every thread takes its share of the sequences where work is by sequence
        const auto normed = [&](const float* weight) {
            for (int64_t b = me; b < B; b += team) {
                rms_norm(x + b * H, weight, H, m.eps, mid + b * wide);
                quantise(mid + b * wide, H, in[b]);
            }
        };
        for (int64_t l = 0; l < m.layers; l++) {
            const Layer& layer = m.layer[l];
            normed(layer.attention_norm);
#pragma omp barrier
            multiply(layer.qkv, in, B, qkv, QKV, false, me, team);
#pragma omp barrier
            for (int64_t b = me; b < B; b += team) {
                float* row = qkv + b * QKV;
                for (int64_t h = 0; h < m.heads + m.kv_heads; h++) {
                    const float* norm = h < m.heads ? layer.q_norm : layer.k_norm;
                    if (norm) rms_norm(row + h * D, norm, D, m.eps, row + h * D);
                    rotate(row + h * D, cos + b * D, sin + b * D, D);
                }
                if (m.bfloat_cache) put(m, (uint16_t*)layer.cache, slots[b], row + QD, row + QD + KD);
                else put(m, (float*)layer.cache, slots[b], row + QD, row + QD + KD);
            }
#pragma omp barrier
            for (int64_t task = me; task < B * m.heads; task += team) {
                const int64_t b = task / m.heads, h = task % m.heads, last = positions[b] + 1;
                const int64_t first = layer.window && last > layer.window ? last - layer.window : 0;
                const float* q = qkv + b * QKV + h * D;
                float* y = mid + b * wide + h * D;
                float* mine = scores + me * (context + 16);
                if (m.bfloat_cache)
                    attend(m, (const uint16_t*)layer.cache, pages + b * most, first, last, h / each, q, mine, y);
                else
                    attend(m, (const float*)layer.cache, pages + b * most, first, last, h / each, q, mine, y);
            }
#pragma omp barrier
            for (int64_t b = me; b < B; b += team) quantise(mid + b * wide, QD, in[b]);
#pragma omp barrier
            multiply(layer.o, in, B, x, H, true, me, team);
#pragma omp barrier
            normed(layer.mlp_norm);
#pragma omp barrier
            const int64_t pairs = m.ffn / TILE;
            for (int64_t t = pairs * me / team; t < pairs * (me + 1) / team; t++)
                for (int64_t b = 0; b < B; b += GROUP) {
                    const int N = B - b < GROUP ? int(B - b) : GROUP;
                    F gate[GROUP], up[GROUP];
                    tiles(layer.gate_up, 2 * t, N, in + b, gate);
                    tiles(layer.gate_up, 2 * t + 1, N, in + b, up);
                    for (int n = 0; n < N; n++) {  // gate · σ(gate) · up
                        const F below = add(all(1.f), exponential(sub(zero(), gate[n])));
                        keep(mid + (b + n) * wide + t * TILE, mul(div(gate[n], below), up[n]));
                    }
                }
#pragma omp barrier
            for (int64_t b = me; b < B; b += team) quantise(mid + b * wide, m.ffn, in[b]);
#pragma omp barrier
            multiply(layer.down, in, B, x, H, true, me, team);
#pragma omp barrier
        }
        normed(m.norm);
#pragma omp barrier
        multiply(m.head, in, B, logits, m.vocab, false, me, team);
    }
}
