// Sixteen floats, sixteen int32 and sixty-four bytes at a time, in AVX-512 with VNNI or in AVX2.
// Everything that native.cpp does with vectors goes through these few functions.

#pragma once
#include <immintrin.h>

#include <cstdint>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

constexpr int REGISTERS = 32;
using F = __m512;   // 16 floats
using I = __m512i;  // 16 int32
using C = __m512i;  // 64 bytes

inline F zero() { return _mm512_setzero_ps(); }
inline F all(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void keep(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }  // a · b + c
inline F most(F a, F b) { return _mm512_max_ps(a, b); }
inline F least(F a, F b) { return _mm512_min_ps(a, b); }
inline F size(F a) { return _mm512_abs_ps(a); }
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline float peak(F a) { return _mm512_reduce_max_ps(a); }
inline F whole(F a) { return _mm512_roundscale_ps(a, 0); }  // to the nearest whole number
inline F times_two_to(F a, F n) { return _mm512_scalef_ps(a, n); }
inline F halves(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline F load(const uint16_t* p) {  // bfloat16
    const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline F load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline F or_zero_below(F y, F x, F least) {  // y where x ≥ least, else 0
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least, _CMP_GE_OQ), y);
}
inline void keep(uint16_t* p, F x) {  // to the nearest bfloat16, ties to even
    const I bits = _mm512_castps_si512(x);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}

inline I none() { return _mm512_setzero_si512(); }
inline F floats(I a) { return _mm512_cvtepi32_ps(a); }
inline int32_t sum(I a) { return _mm512_reduce_add_epi32(a); }
inline I keep_bytes(int8_t* p, F x) {  // rounded; what was kept
    const I a = _mm512_cvtps_epi32(x);
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a));
    return a;
}
inline void keep(int8_t* p, F x) { keep_bytes(p, x); }

inline C bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline C low_half(C a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline C high_half(C a) { return low_half(_mm512_srli_epi16(a, 4)); }
// a + Σ over each four neighbours of codes (unsigned) · inputs (signed, the same four everywhere)
template <int BITS>
inline I dot(I a, C codes, int32_t inputs) {
    return _mm512_dpbusd_epi32(a, codes, _mm512_set1_epi32(inputs));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr int REGISTERS = 16;  // each half of what holds 16 floats
struct F { __m256 a, b; };
struct I { __m256i a, b; };
using C = I;

inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void keep(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F most(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F least(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F size(F x) { return most(x, sub(zero(), x)); }
inline float sum(F x) {
    const __m256 both = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float peak(F x) {
    const __m256 both = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline F whole(F x) {
    constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, how), _mm256_round_ps(x.b, how)};
}
inline __m256 times_two_to(__m256 x, __m256 n) {  // n from −126 to 127
    const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
}
inline F times_two_to(F x, F n) { return {times_two_to(x.a, n.a), times_two_to(x.b, n.b)}; }
inline F halves(const uint8_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
inline __m256 from_bfloat(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F load(const uint16_t* p) { return {from_bfloat(p), from_bfloat(p + 8)}; }
inline F load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
inline F or_zero_below(F y, F x, F least) {
    return {_mm256_and_ps(y.a, _mm256_cmp_ps(x.a, least.a, _CMP_GE_OQ)),
            _mm256_and_ps(y.b, _mm256_cmp_ps(x.b, least.b, _CMP_GE_OQ))};
}
inline __m256i to_bfloat(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    return _mm256_srli_epi32(up, 16);
}
inline void keep(uint16_t* p, F x) {
    const __m256i mixed = _mm256_packus_epi32(to_bfloat(x.a), to_bfloat(x.b));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(mixed, 0xd8));
}

inline I none() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline F floats(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline int32_t sum(I x) {
    const __m256i both = _mm256_add_epi32(x.a, x.b);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline I keep_bytes(int8_t* p, F x) {
    const I a = {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)};
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.a, a.b), 0xd8);
    const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(low, high));
    return a;
}
inline void keep(int8_t* p, F x) { keep_bytes(p, x); }

inline C bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline __m256i low_half(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline C low_half(C x) { return {low_half(x.a), low_half(x.b)}; }
inline C high_half(C x) {
    return {low_half(_mm256_srli_epi16(x.a, 4)), low_half(_mm256_srli_epi16(x.b, 4))};
}
template <int BITS>
inline __m256i dot(__m256i sums, __m256i codes, __m256i inputs) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (BITS == 4)  // 15 · 127 · 2 fits 16 bits
        return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, inputs), ones));
    // 255 · 127 · 2 does not: half of the code, twice, and its last bit
    const __m256i half = _mm256_and_si256(_mm256_srli_epi16(codes, 1), _mm256_set1_epi8(127));
    const __m256i last = _mm256_and_si256(codes, _mm256_set1_epi8(1));
    const __m256i twice = _mm256_madd_epi16(_mm256_maddubs_epi16(half, inputs), _mm256_set1_epi16(2));
    const __m256i once = _mm256_madd_epi16(_mm256_maddubs_epi16(last, inputs), ones);
    return _mm256_add_epi32(sums, _mm256_add_epi32(twice, once));
}
template <int BITS>
inline I dot(I sums, C codes, int32_t inputs) {
    const __m256i four = _mm256_set1_epi32(inputs);
    return {dot<BITS>(sums.a, codes.a, four), dot<BITS>(sums.b, codes.b, four)};
}

#else
#error "needs AVX2 with FMA and F16C, or AVX-512 with VNNI"
#endif

// e^x, relative error about 2e-7: 2^n · polynomial of the rest; 0 below e^-87.
inline F exponential(F given) {
    const F x = most(least(given, all(88.f)), all(-87.f));
    const F n = whole(mul(x, all(1.44269504f)));
    F r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    const float factors[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    F p = all(1.f / 5040);
    for (int i = 0; i < 7; i++) p = fma(p, r, all(factors[i]));
    return or_zero_below(times_two_to(p, n), given, all(-87.f));
}
