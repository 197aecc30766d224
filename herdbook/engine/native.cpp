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
// Σ code·a is what the VNNI instruction makes of unsigned codes and signed inputs.

#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>

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

inline float sum16(__m512 x) { return _mm512_reduce_add_ps(x); }

// e^x, relative error about 2e-7: 2^n · polynomial of the rest.
inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.f)), _mm512_set1_ps(-87.f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    const float factors[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    __m512 p = _mm512_set1_ps(1.f / 5040);
    for (int i = 0; i < 7; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(factors[i]));
    return _mm512_scalef_ps(p, n);
}

void quantise(const float* x, int64_t columns, Inputs out) {
    for (int64_t b = 0; b < columns / BLOCK; b++) {
        const __m512 lo = _mm512_loadu_ps(x + b * BLOCK), hi = _mm512_loadu_ps(x + b * BLOCK + 16);
        const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(lo), _mm512_abs_ps(hi)));
        const float scale = most / 127.f, inverse = most > 0 ? 127.f / most : 0.f;
        const __m512 by = _mm512_set1_ps(inverse);
        const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(lo, by));
        const __m512i c = _mm512_cvtps_epi32(_mm512_mul_ps(hi, by));
        _mm_storeu_si128((__m128i*)(out.codes + b * BLOCK), _mm512_cvtsepi32_epi8(a));
        _mm_storeu_si128((__m128i*)(out.codes + b * BLOCK + 16), _mm512_cvtsepi32_epi8(c));
        out.scales[b] = scale;
        out.sums[b] = scale * _mm512_reduce_add_epi32(_mm512_add_epi32(a, c));
    }
}

template <int N, int BITS>  // N sequences at a time
inline void tile(const uint8_t* w, int64_t blocks, const Inputs* in, __m512* y) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int n = 0; n < N; n++) y[n] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        __m512i sums[N];
        for (int n = 0; n < N; n++) sums[n] = _mm512_setzero_si512();
        for (int p = 0; p < BITS; p++) {
            const __m512i raw = _mm512_loadu_si512(w + 64 * p);
            const __m512i codes = BITS == 8 ? raw : _mm512_and_si512(raw, low);
            for (int n = 0; n < N; n++) {
                int32_t four;
                std::memcpy(&four, in[n].codes + b * BLOCK + 4 * p, 4);
                sums[n] = _mm512_dpbusd_epi32(sums[n], codes, _mm512_set1_epi32(four));
            }
            if (BITS == 4) {
                const __m512i high = _mm512_and_si512(_mm512_srli_epi16(raw, 4), low);
                for (int n = 0; n < N; n++) {
                    int32_t four;
                    std::memcpy(&four, in[n].codes + b * BLOCK + 16 + 4 * p, 4);
                    sums[n] = _mm512_dpbusd_epi32(sums[n], high, _mm512_set1_epi32(four));
                }
            }
        }
        w += 64 * BITS;
        const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)w));
        const __m512 minimum = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(w + 32)));
        w += 64;
        for (int n = 0; n < N; n++) {
            const __m512 by = _mm512_mul_ps(scale, _mm512_set1_ps(in[n].scales[b]));
            y[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[n]), by, y[n]);
            y[n] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(in[n].sums[b]), y[n]);
        }
    }
}

template <int BITS>
inline void tiles(const uint8_t* w, int64_t blocks, int N, const Inputs* in, __m512* y) {
    switch (N) {
        case 1: return tile<1, BITS>(w, blocks, in, y);
        case 2: return tile<2, BITS>(w, blocks, in, y);
        case 3: return tile<3, BITS>(w, blocks, in, y);
        default: return tile<4, BITS>(w, blocks, in, y);
    }
}

// Rows 16t to 16t + 15 of the matrix times N inputs.
inline void tiles(const Matrix& m, int64_t t, int N, const Inputs* in, __m512* y) {
    const int64_t blocks = m.columns / BLOCK;
    const uint8_t* w = m.tiles + t * blocks * (64 * m.bits + 64);
    if (m.bits == 4) tiles<4>(w, blocks, N, in, y);
    else tiles<8>(w, blocks, N, in, y);
    if (m.bias)
        for (int n = 0; n < N; n++) y[n] = _mm512_add_ps(y[n], _mm512_loadu_ps(m.bias + t * TILE));
}

// This thread's part of y[b][row] (+)= matrix · x[b].
void multiply(const Matrix& m, const Inputs* in, int64_t B, float* y, int64_t stride, bool add,
              int me, int threads) {
    const int64_t count = m.rows / TILE;
    for (int64_t t = count * me / threads; t < count * (me + 1) / threads; t++)
        for (int64_t b = 0; b < B; b += GROUP) {
            const int N = B - b < GROUP ? int(B - b) : GROUP;
            __m512 out[GROUP];
            tiles(m, t, N, in + b, out);
            for (int n = 0; n < N; n++) {
                float* to = y + (b + n) * stride + t * TILE;
                _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), out[n]) : out[n]);
            }
        }
}

void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* y) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 v = _mm512_loadu_ps(x + i);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const __m512 by = _mm512_set1_ps(1.f / std::sqrt(sum16(squares) / size + eps));
    for (int64_t i = 0; i < size; i += 16)
        _mm512_storeu_ps(y + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), by),
                                              _mm512_loadu_ps(weight + i)));
}

// Half style: i turns with i + D/2; sin comes negated in its first half.
void rotate(float* x, const float* cos, const float* sin, int64_t D) {
    for (int64_t i = 0; i < D / 2; i++) {
        const float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] + b * sin[i];
        x[i + D / 2] = b * cos[i + D / 2] + a * sin[i + D / 2];
    }
}

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load(const uint16_t* p) {  // bfloat16
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void keep(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
inline void keep(uint16_t* p, __m512 x) {  // to the nearest bfloat16, ties to even
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}

// One head of one sequence: q [D] looks at the tokens `first` to `last` of its pages.
template <typename T>
void attend(const Model& m, const T* cache, const int64_t* pages, int64_t first, int64_t last,
            int64_t kv, const float* q, float* scores, float* y) {
    const int64_t D = m.head_dim, token = 2 * m.kv_heads * D;
    const auto at = [&](int64_t i) {
        return cache + (pages[i / m.page_tokens] * m.page_tokens + i % m.page_tokens) * token + kv * D;
    };
    float most = -INFINITY;
    for (int64_t i = first; i < last; i++) {
        const T* k = at(i);
        __m512 dot = _mm512_setzero_ps();
        for (int64_t d = 0; d < D; d += 16)
            dot = _mm512_fmadd_ps(_mm512_loadu_ps(q + d), load(k + d), dot);
        const float score = sum16(dot) * m.scale;
        scores[i - first] = score;
        most = score > most ? score : most;
    }
    const int64_t count = last - first;
    for (int64_t i = count; i < (count + 15) / 16 * 16; i++) scores[i] = -INFINITY;
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
        const __m512 s = _mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(most));
        const __mmask16 real = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
        const __m512 e = _mm512_maskz_mov_ps(real, exp16(s));
        total = _mm512_add_ps(total, e);
        _mm512_storeu_ps(scores + i, e);
    }
    const float by = 1.f / sum16(total);
    for (int64_t d = 0; d < D; d += 64) {
        __m512 sum[4] = {};
        const int64_t parts = D - d >= 64 ? 4 : (D - d) / 16;
        for (int64_t i = first; i < last; i++) {
            const T* v = at(i) + m.kv_heads * D + d;
            const __m512 e = _mm512_set1_ps(scores[i - first]);
            for (int64_t p = 0; p < parts; p++) sum[p] = _mm512_fmadd_ps(e, load(v + 16 * p), sum[p]);
        }
        for (int64_t p = 0; p < parts; p++)
            _mm512_storeu_ps(y + d + 16 * p, _mm512_mul_ps(sum[p], _mm512_set1_ps(by)));
    }
}

template <typename T>
void put(const Model& m, T* cache, int64_t slot, const float* k, const float* v) {
    T* to = cache + slot * 2 * m.kv_heads * m.head_dim;
    const int64_t size = m.kv_heads * m.head_dim;
    for (int64_t i = 0; i < size; i += 16) keep(to + i, _mm512_loadu_ps(k + i));
    for (int64_t i = 0; i < size; i += 16) keep(to + size + i, _mm512_loadu_ps(v + i));
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
        const int me = omp_get_thread_num(), all = omp_get_num_threads();
        // every thread takes its share of the sequences where work is by sequence
        const auto normed = [&](const float* weight) {
            for (int64_t b = me; b < B; b += all) {
                rms_norm(x + b * H, weight, H, m.eps, mid + b * wide);
                quantise(mid + b * wide, H, in[b]);
            }
        };
        for (int64_t l = 0; l < m.layers; l++) {
            const Layer& layer = m.layer[l];
            normed(layer.attention_norm);
#pragma omp barrier
            multiply(layer.qkv, in, B, qkv, QKV, false, me, all);
#pragma omp barrier
            for (int64_t b = me; b < B; b += all) {
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
            for (int64_t task = me; task < B * m.heads; task += all) {
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
            for (int64_t b = me; b < B; b += all) quantise(mid + b * wide, QD, in[b]);
#pragma omp barrier
            multiply(layer.o, in, B, x, H, true, me, all);
#pragma omp barrier
            normed(layer.mlp_norm);
#pragma omp barrier
            const int64_t pairs = m.ffn / TILE;
            for (int64_t t = pairs * me / all; t < pairs * (me + 1) / all; t++)
                for (int64_t b = 0; b < B; b += GROUP) {
                    const int N = B - b < GROUP ? int(B - b) : GROUP;
                    __m512 gate[GROUP], up[GROUP];
                    tiles(layer.gate_up, 2 * t, N, in + b, gate);
                    tiles(layer.gate_up, 2 * t + 1, N, in + b, up);
                    for (int n = 0; n < N; n++) {  // gate · σ(gate) · up
                        const __m512 one = _mm512_set1_ps(1.f);
                        const __m512 minus = _mm512_sub_ps(_mm512_setzero_ps(), gate[n]);
                        const __m512 sigma = _mm512_div_ps(one, _mm512_add_ps(one, exp16(minus)));
                        _mm512_storeu_ps(mid + (b + n) * wide + t * TILE,
                                         _mm512_mul_ps(_mm512_mul_ps(gate[n], sigma), up[n]));
                    }
                }
#pragma omp barrier
            for (int64_t b = me; b < B; b += all) quantise(mid + b * wide, m.ffn, in[b]);
#pragma omp barrier
            multiply(layer.down, in, B, x, H, true, me, all);
#pragma omp barrier
        }
        normed(m.norm);
#pragma omp barrier
        multiply(m.head, in, B, logits, m.vocab, false, me, all);
    }
}
