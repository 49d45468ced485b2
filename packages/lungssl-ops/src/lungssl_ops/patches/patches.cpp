// The masked, patch-normalised squared error and its gradient, row by row; see cpu.py.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

namespace {

struct bf16 { uint16_t bits; };

inline float get(float v) { return v; }
inline float get(bf16 v) {
    const uint32_t wide = uint32_t(v.bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}

inline void put(float &to, float v) { to = v; }
inline void put(bf16 &to, float v) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    bits += 0x7fff + ((bits >> 16) & 1);
    to.bits = v == v ? uint16_t(bits >> 16) : uint16_t(0x7fc0);
}

// Sums of a row are of float, a vector's lanes by themselves; those over rows are the caller's.
// error, total [rows]: sums of weight * (pred - target)^2 and of weight, 0 for rows that aren't masked. gradient, where
// there is one: factor * weight * (pred - target).
template <class T>
void masked_patch_mse(const T *pred, const float *target, const uint8_t *mask, const float *weight, int64_t rows,
                      int64_t p, int normalise, float floor, double *error, double *total, float factor, T *gradient, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t row = 0; row < rows; ++row) {
        const T *guess = pred + row * p;
        const float *truth = target + row * p, *w = weight + row * p;
        T *grad = gradient ? gradient + row * p : nullptr;
        error[row] = total[row] = 0;
        if (!mask[row]) {
            if (grad) std::memset(static_cast<void *>(grad), 0, p * sizeof(T));
            continue;
        }
        float mean = 0, scale = 1;
        if (normalise) {  // two passes: mean of squares minus squared mean cancels in flat patches
            float sum = 0, squares = 0, count = 0;
            #pragma omp simd reduction(+ : sum, count)
            for (int64_t i = 0; i < p; ++i) sum += w[i] > 0 ? truth[i] : 0.0f, count += w[i] > 0 ? 1.0f : 0.0f;
            mean = sum / (count > 1 ? count : 1);
            #pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < p; ++i) squares += w[i] > 0 ? (truth[i] - mean) * (truth[i] - mean) : 0.0f;
            const float variance = squares / (count > 2 ? count - 1 : 1);
            scale = 1 / std::sqrt(variance < floor ? floor : variance);
        }
        float sum = 0, weights = 0;
        #pragma omp simd reduction(+ : sum, weights)
        for (int64_t i = 0; i < p; ++i) {
            const float off = get(guess[i]) - (truth[i] - mean) * scale;
            sum += w[i] * off * off, weights += w[i];
        }
        error[row] = sum, total[row] = weights;
        if (grad) {
            #pragma omp simd
            for (int64_t i = 0; i < p; ++i) put(grad[i], factor * w[i] * (get(guess[i]) - (truth[i] - mean) * scale));
        }
    }
}

}  // namespace

extern "C" {

void masked_patch_mse_f32(const float *pred, const float *target, const uint8_t *mask, const float *weight,
                          int64_t rows, int64_t p, int normalise, float floor, double *error, double *total,
                          float factor, float *gradient, int threads) {
    masked_patch_mse(pred, target, mask, weight, rows, p, normalise, floor, error, total, factor, gradient, threads);
}

void masked_patch_mse_bf16(const bf16 *pred, const float *target, const uint8_t *mask, const float *weight,
                           int64_t rows, int64_t p, int normalise, float floor, double *error, double *total,
                           float factor, bf16 *gradient, int threads) {
    masked_patch_mse(pred, target, mask, weight, rows, p, normalise, floor, error, total, factor, gradient, threads);
}
}
