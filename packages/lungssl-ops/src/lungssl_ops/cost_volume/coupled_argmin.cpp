// The label of least cost + weight |d - smooth|^2 at every voxel, in one read of the cost; nothing is materialised.
//
// A thread takes blocks of 512 voxels through all labels in ascending order; a label wins only if it is strictly less
// than all before it. Products and sums are rounded one by one, never contracted to fused ones: so the same label wins
// here, in the definition and on a GPU.

#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 512;
constexpr int LANES = 8;

struct Half {
    uint16_t bits;
};

template <typename T>
struct Vector {
    typedef T type __attribute__((vector_size(LANES * sizeof(T))));
    // Labels as wide as T, so that a comparison's mask fits both.
    typedef typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type Label;
    typedef Label labels __attribute__((vector_size(LANES * sizeof(T))));
};

template <typename V, typename T>
inline void load(V& v, const T* from) {
    std::memcpy(&v, from, sizeof v);
}

template <typename V, typename T>
inline void store(T* to, const V& v) {
    std::memcpy(to, &v, sizeof v);
}

inline float one(Half half) {
#ifdef __F16C__
    return _cvtsh_ss(half.bits);
#else
    _Float16 value;
    std::memcpy(&value, &half, sizeof value);
    return static_cast<float>(value);
#endif
}

template <typename T>
inline T one(T value) {
    return value;
}

inline void load(Vector<float>::type& v, const Half* from) {
#ifdef __F16C__
    const __m256 floats = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    std::memcpy(&v, &floats, sizeof v);
#else
    for (int lane = 0; lane < LANES; ++lane) v[lane] = one(from[lane]);
#endif
}

// Goes through the `side` labels along x from label `first`; `cost` is at the first of `count` voxels.
template <typename Cost, typename T>
void row_of_labels(const Cost* cost, int64_t voxels, int64_t side, int64_t first, int64_t count, const T* across,
                   const T* qx, T* best, typename Vector<T>::Label* label) {
    typedef typename Vector<T>::type V;
    typedef typename Vector<T>::labels L;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        V least, over, c, q;
        L chosen;
        load(least, best + i);
        load(chosen, label + i);
        load(over, across + i);
        for (int64_t j = 0; j < side; ++j) {
            load(c, cost + j * voxels + i);
            load(q, qx + j * BLOCK + i);
            const V value = c + (over + q);
            const L less = value < least;
            least = less ? value : least;
            chosen = less ? L{} + static_cast<typename Vector<T>::Label>(first + j) : chosen;
        }
        store(best + i, least);
        store(label + i, chosen);
    }
    for (; i < count; ++i) {
        for (int64_t j = 0; j < side; ++j) {
            const T value = one(cost[j * voxels + i]) + (across[i] + qx[j * BLOCK + i]);
            if (value < best[i]) {
                best[i] = value;
                label[i] = static_cast<typename Vector<T>::Label>(first + j);
            }
        }
    }
}

template <typename Cost, typename T>
void coupled_argmin(const Cost* cost, const T* smooth, T weight, int64_t b, int64_t side, int64_t voxels, T* scratch,
                    T* out, int threads) {
    const int64_t blocks = (voxels + BLOCK - 1) / BLOCK, labels = side * side * side, reach = side / 2;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < b * blocks; ++task) {
#ifdef _OPENMP
        T* penalties = scratch + omp_get_thread_num() * 3 * side * BLOCK;
#else
        T* penalties = scratch;
#endif
        const int64_t sample = task / blocks, start = task % blocks * BLOCK;
        const int64_t count = voxels - start < BLOCK ? voxels - start : BLOCK;
        for (int64_t axis = 0; axis < 3; ++axis) {
            const T* s = smooth + (sample * 3 + axis) * voxels + start;
            for (int64_t j = 0; j < side; ++j) {
                T* q = penalties + (axis * side + j) * BLOCK;
                const T step = static_cast<T>(j - reach);
                for (int64_t i = 0; i < count; ++i) {
                    const T difference = step - s[i];
                    q[i] = weight * (difference * difference);
                }
            }
        }
        T best[BLOCK], across[BLOCK];
        typename Vector<T>::Label label[BLOCK] = {};
        for (int64_t i = 0; i < count; ++i) best[i] = std::numeric_limits<T>::infinity();
        for (int64_t k = 0; k < side * side; ++k) {
            const T *qz = penalties + (2 * side + k / side) * BLOCK, *qy = penalties + (side + k % side) * BLOCK;
            for (int64_t i = 0; i < count; ++i) across[i] = qz[i] + qy[i];
            row_of_labels(cost + (sample * labels + k * side) * voxels + start, voxels, side, k * side, count, across,
                          penalties, best, label);
        }
        T *ox = out + sample * 3 * voxels + start, *oy = ox + voxels, *oz = oy + voxels;
        for (int64_t i = 0; i < count; ++i) {
            ox[i] = static_cast<T>(label[i] % side - reach);
            oy[i] = static_cast<T>(label[i] / side % side - reach);
            oz[i] = static_cast<T>(label[i] / (side * side) - reach);
        }
    }
}

}  // namespace

extern "C" {

void coupled_argmin_f16(const void* cost, const float* smooth, double weight, int64_t b, int64_t side, int64_t voxels,
                        float* scratch, float* out, int threads) {
    coupled_argmin(static_cast<const Half*>(cost), smooth, static_cast<float>(weight), b, side, voxels, scratch, out,
                   threads);
}

void coupled_argmin_f32(const float* cost, const float* smooth, double weight, int64_t b, int64_t side, int64_t voxels,
                        float* scratch, float* out, int threads) {
    coupled_argmin(cost, smooth, static_cast<float>(weight), b, side, voxels, scratch, out, threads);
}

void coupled_argmin_f64(const double* cost, const double* smooth, double weight, int64_t b, int64_t side,
                        int64_t voxels, double* scratch, double* out, int threads) {
    coupled_argmin(cost, smooth, weight, b, side, voxels, scratch, out, threads);
}
}
