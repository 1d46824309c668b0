// Products with weights of one bit. Bits stand row by row in whole bytes, the lowest bit first, 1 for +1 and 0 for -1;
// bits behind a row's end are 0. Vectors are those of GCC and Clang, which turn them into what the processor has.

#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
typedef uint16_t lane_bits;
#else
constexpr int LANES = 8;
typedef uint8_t lane_bits;
#endif
constexpr int64_t BLOCK = 32;  // outputs, and examples, whose bits stay in the nearest cache
constexpr int ROWS = 4;  // examples that share one reading of the weights
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// The bytes behind the last whole word.
inline uint64_t rest(const uint8_t* row, int64_t bytes) {
    uint64_t value = 0;
    std::memcpy(&value, row + bytes / 8 * 8, bytes % 8);
    return value;
}

// As many weights as there are lanes, as what they do to a number's sign bit: nothing where the weight's bit is 1.
#ifdef __AVX512F__
typedef __mmask16 turning;

inline turning turned(const uint8_t* bits) {
    lane_bits packed;
    std::memcpy(&packed, bits, sizeof packed);
    return (turning)~packed;
}

inline floats applied(words value, turning turn) {
    return (floats)_mm512_mask_xor_epi32((__m512i)value, turn, (__m512i)value, _mm512_set1_epi32((int)0x80000000u));
}
#else
typedef words turning;

inline turning turned(const uint8_t* bits) {
    const words shifts = {31, 30, 29, 28, 27, 26, 25, 24};
    return (((words){} + (uint32_t)(lane_bits)~*bits) << shifts) & ((words){} + 0x80000000u);
}

inline floats applied(words value, turning turn) { return (floats)(value ^ turn); }
#endif

inline bool positive(const uint8_t* bits, int64_t k) { return (bits[k / 8] >> (k % 8)) & 1; }

// y[r] = sum_i s_i x[r, i]: the sign bit of x is turned where the weight's bit is 0. CHAINS sums run beside each other.
template <int R, int CHAINS>
inline void signed_row(const float* x, int64_t n, const uint8_t* bits, float* y, int64_t out) {
    floats sums[R][CHAINS] = {};
    int64_t i = 0;
    for (; i + CHAINS * LANES <= n; i += CHAINS * LANES)
        for (int c = 0; c < CHAINS; c++) {
            const turning turn = turned(bits + i / 8 + c * LANES / 8);
            for (int r = 0; r < R; r++) {
                words value;
                std::memcpy(&value, x + r * n + i + c * LANES, sizeof value);
                sums[r][c] += applied(value, turn);
            }
        }
    for (int r = 0; r < R; r++) {
        floats all = sums[r][0];
        for (int c = 1; c < CHAINS; c++) all += sums[r][c];
        float lanes[LANES];
        std::memcpy(lanes, &all, sizeof all);
        for (int half = LANES / 2; half > 0; half /= 2)
            for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
        float sum = lanes[0];
        for (int64_t k = i; k < n; k++) sum += positive(bits, k) ? x[r * n + k] : -x[r * n + k];
        y[r * out] = sum;
    }
}

// (how many agree) - (how many differ) of n activations and weights; with ZEROS of those activations that are there.
template <bool ZEROS>
inline float agreement(const uint8_t* signs, const uint8_t* there, const uint8_t* bits, int64_t n, int64_t bytes) {
    int64_t differ = 0, count = 0;
    for (int64_t k = 0; k < bytes / 8; k++) {
        uint64_t a, w, z;
        std::memcpy(&a, signs + 8 * k, 8);
        std::memcpy(&w, bits + 8 * k, 8);
        if (ZEROS) {
            std::memcpy(&z, there + 8 * k, 8);
            differ += __builtin_popcountll((a ^ w) & z);
            count += __builtin_popcountll(z);
        } else {
            differ += __builtin_popcountll(a ^ w);
        }
    }
    if (bytes % 8) {
        uint64_t d = rest(signs, bytes) ^ rest(bits, bytes);
        if (ZEROS) {
            const uint64_t z = rest(there, bytes);
            d &= z, count += __builtin_popcountll(z);
        }
        differ += __builtin_popcountll(d);
    }
    return (float)((ZEROS ? count : n) - 2 * differ);
}

}  // namespace

// Real activations x (rows, n): y = x S^T with S the signs (out, n).
extern "C" void signed_sums(const float* x, const uint8_t* bits, float* y, int64_t rows, int64_t n, int64_t out,
                            int64_t threads) {
    const int64_t bytes = (n + 7) / 8;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t o = 0; o < out; o++) {
        int64_t r = 0;
        for (; r + ROWS <= rows; r += ROWS) signed_row<ROWS, 2>(x + r * n, n, bits + o * bytes, y + r * out + o, out);
        for (; r < rows; r++) signed_row<1, 8>(x + r * n, n, bits + o * bytes, y + r * out + o, out);
    }
}

// Bits of activations -1, 0 and 1, by sign and by being there. Returns 0 at any other value, 1 without zeros, 2 with.
extern "C" int64_t pack_activations(const float* x, uint8_t* signs, uint8_t* there, int64_t rows, int64_t n) {
    const int64_t bytes = (n + 7) / 8;
    int64_t zeros = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t b = 0; b < bytes; b++) {
            const float* from = x + r * n + 8 * b;
            const int many = n - 8 * b < 8 ? (int)(n - 8 * b) : 8;
            unsigned sign = 0, nonzero = 0;
            int known = 0;
            for (int j = 0; j < many; j++) {
                const unsigned plus = from[j] == 1.0f, minus = from[j] == -1.0f;
                sign |= plus << j, nonzero |= (plus | minus) << j;
                known += (plus | minus) | (from[j] == 0.0f);
            }
            if (known < many) return 0;
            zeros |= nonzero != (1u << many) - 1;
            signs[r * bytes + b] = (uint8_t)sign, there[r * bytes + b] = (uint8_t)nonzero;
        }
    return 1 + zeros;
}

// Activations in bits: y = (how many agree) - (how many differ). `there` is null where none is 0.
extern "C" void agreements(const uint8_t* signs, const uint8_t* there, const uint8_t* bits, float* y, int64_t rows,
                           int64_t n, int64_t out, int64_t threads) {
    const int64_t bytes = (n + 7) / 8;
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
    for (int64_t rs = 0; rs < rows; rs += BLOCK)
        for (int64_t os = 0; os < out; os += BLOCK)
            for (int64_t r = rs; r < rs + BLOCK && r < rows; r++)
                for (int64_t o = os; o < os + BLOCK && o < out; o++) {
                    const uint8_t *a = signs + r * bytes, *w = bits + o * bytes;
                    y[r * out + o] = there ? agreement<true>(a, there + r * bytes, w, n, bytes)
                                           : agreement<false>(a, nullptr, w, n, bytes);
                }
}

// Weights of +1 and -1 from their bits, `rows` of n.
extern "C" void unpack_signs(const uint8_t* bits, float* weights, int64_t rows, int64_t n, int64_t threads) {
    const int64_t bytes = (n + 7) / 8;
    const words one = (words)((floats){} + 1.0f);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t* row = bits + r * bytes;
        int64_t k = 0;
        for (; k + LANES <= n; k += LANES) {
            const floats value = applied(one, turned(row + k / 8));
            std::memcpy(weights + r * n + k, &value, sizeof value);
        }
        for (; k < n; k++) weights[r * n + k] = positive(row, k) ? 1.0f : -1.0f;
    }
}
