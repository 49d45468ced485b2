// MIND-SSC. Rows of eight voxels at a time; a thread takes whole planes.
//
// For output plane z, the thread marches along y. A ring holds, per pair, the squared differences summed over the
// window's planes for its last 2r+1 rows; a row of distances is the sum over the ring, then over the window along x.
// A first sweep sums the variance per plane, a second computes the same distances again and writes the result: cheaper
// than to write and read twelve volumes. Sums are short and never updated by subtraction, so nothing drifts.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;
constexpr int N_PAIRS = 12;

template <typename T>
struct Vector {
    typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));

template <typename T>
inline typename Vector<T>::type load(const T* from) {
    typename Vector<T>::type v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <typename T>
inline void store(T* to, const typename Vector<T>::type& v) {
    std::memcpy(to, &v, sizeof v);
}

// exp(x) for x <= 0, within 2e-7: 2^n times the Taylor series of degree 7 on [-ln 2 / 2, ln 2 / 2], whose remainder is
// 5e-9. Below -87 it gives exp(-87), where the true value is less than 2e-38.
inline void exponential(Vector<float>::type& x) {
    typedef Vector<float>::type V;
    x = x < -87.0f ? V{} - 87.0f : x;
    const float magic = 12582912.0f;  // 1.5 x 2^23: adding it rounds to a whole number
    V n = (x * 1.44269504f + magic) - magic;
    V r = x - n * 0.693145752f;  // ln 2 in two parts, the first exact in products with n
    r = r - n * 1.42860677e-6f;
    V p = 1.0f + r * (1.0f / 7);
    p = 1.0f + r * p * (1.0f / 6);
    p = 1.0f + r * p * (1.0f / 5);
    p = 1.0f + r * p * (1.0f / 4);
    p = 1.0f + r * p * (1.0f / 3);
    p = 1.0f + r * p * 0.5f;
    p = 1.0f + r * p;
    Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
    V scale;
    std::memcpy(&scale, &bits, sizeof scale);
    x = p * scale;
}

inline void exponential(Vector<double>::type& x) {
    for (int lane = 0; lane < LANES; ++lane) x[lane] = std::exp(x[lane]);
}

#ifndef __F16C__
inline uint16_t half_bits(float value) {  // of a number in [0, 1] or NaN, rounded to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7e00;
    if (value < 6.103515625e-5f) return static_cast<uint16_t>(std::nearbyint(value * 16777216.0f));  // subnormal
    bits -= 112u << 23;
    bits += 0xfff + ((bits >> 13) & 1);
    return static_cast<uint16_t>(bits >> 13);
}
#endif

template <typename T>
inline void write(T* out, int64_t at, const typename Vector<T>::type& v, int64_t count) {
    if (count >= LANES) {
        store(out + at, v);
    } else {
        std::memcpy(out + at, &v, count * sizeof(T));
    }
}

template <typename T>
inline void write(uint16_t* out, int64_t at, const Vector<float>::type& v, int64_t count) {
    uint16_t halves[LANES];
#ifdef __F16C__
    __m256 floats;
    std::memcpy(&floats, &v, sizeof floats);
    __m128i packed = _mm256_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(halves, &packed, sizeof halves);
#else
    for (int lane = 0; lane < LANES; ++lane) halves[lane] = half_bits(v[lane]);
#endif
    std::memcpy(out + at, halves, (count < LANES ? count : LANES) * sizeof(uint16_t));
}

template <typename T>
inline void write(uint8_t* out, int64_t at, const Vector<float>::type& v, int64_t count) {
    uint8_t bytes[LANES];
    for (int lane = 0; lane < LANES; ++lane) bytes[lane] = static_cast<uint8_t>(std::nearbyint(v[lane] * 255.0f));
    std::memcpy(out + at, bytes, count < LANES ? count : LANES);
}

inline int64_t clamp(int64_t i, int64_t size) { return i < 0 ? 0 : i >= size ? size - 1 : i; }

template <typename T>
struct Sweep {
    const T* image;  // of one sample; rows padded by `dilation` at the front, and at the back to whole vectors
    int64_t z, y, x, radius, dilation;
    int64_t rows;    // voxels of a row, rounded up to whole vectors
    T *ring, *line, *distances;

    Sweep(const T* image, int64_t z, int64_t y, int64_t x, int64_t radius, int64_t dilation, T* scratch)
        : image(image), z(z), y(y), x(x), radius(radius), dilation(dilation) {
        rows = (x + LANES - 1) / LANES * LANES;
        ring = scratch;
        distances = ring + N_PAIRS * (2 * radius + 1) * rows;
        line = distances + N_PAIRS * rows;
    }

    const T* row(int64_t iz, int64_t iy) const {
        return image + (clamp(iz, z) * y + clamp(iy, y)) * (rows + 2 * dilation);
    }

    T* ring_row(int pair, int64_t iy) const { return ring + (iy % (2 * radius + 1) * N_PAIRS + pair) * rows; }

    // Squared differences at row iy, summed over the window's planes around iz.
    void fill_ring(int64_t iz, int64_t iy) const {
        typedef typename Vector<T>::type V;
        for (int64_t plane = iz - radius; plane <= iz + radius; ++plane) {
            const bool first = plane == iz - radius;
            const int64_t c = clamp(plane, z);
            const T *below = row(c - dilation, iy) + dilation, *above = row(c + dilation, iy) + dilation;
            const T *before = row(c, iy - dilation) + dilation, *behind = row(c, iy + dilation) + dilation;
            const T *right = row(c, iy), *left = right + 2 * dilation;
            for (int64_t at = 0; at < rows; at += LANES) {
                // -z, +z, -y, +y, -x, +x: the order of NEIGHBOURS in reference.py.
                const V n0 = load(below + at), n1 = load(above + at), n2 = load(before + at), n3 = load(behind + at),
                        n4 = load(right + at), n5 = load(left + at);
                // The order of PAIRS in reference.py.
                const V differences[N_PAIRS] = {n1 - n2, n3 - n0, n2 - n0, n3 - n1, n2 - n4, n3 - n5,
                                                n4 - n0, n1 - n5, n3 - n4, n5 - n2, n1 - n4, n5 - n0};
                for (int pair = 0; pair < N_PAIRS; ++pair) {
                    T* to = ring_row(pair, iy) + at;
                    const V square = differences[pair] * differences[pair];
                    store(to, first ? square : load(to) + square);
                }
            }
        }
    }

    // Twelve rows of window sums at row iy, from the ring.
    void fill_distances(int64_t iy) const {
        typedef typename Vector<T>::type V;
        for (int pair = 0; pair < N_PAIRS; ++pair) {
            T* middle = line + radius;
            for (int64_t r = iy - radius; r <= iy + radius; ++r) {
                const bool first = r == iy - radius;
                const T* from = ring_row(pair, clamp(r, y));
                for (int64_t at = 0; at < rows; at += LANES) {
                    store(middle + at, first ? load(from + at) : load(middle + at) + load(from + at));
                }
            }
            for (int64_t k = 1; k <= radius; ++k) {
                middle[-k] = middle[0];
                middle[x - 1 + k] = middle[x - 1];
            }
            for (int64_t at = 0; at < rows; at += LANES) {
                V sum = {};
                for (int64_t k = 0; k <= 2 * radius; ++k) sum += load(line + at + k);
                store(distances + pair * rows + at, sum);
            }
        }
    }

    // visit(iy, at, values): the distances of eight voxels less their minimum, and their mean.
    template <typename Visit>
    void plane(int64_t iz, Visit visit) const {
        typedef typename Vector<T>::type V;
        const int64_t side = 2 * radius + 1;
        const T per_box = T(1) / static_cast<T>(side * side * side);
        for (int64_t iy = 0; iy < radius && iy < y; ++iy) fill_ring(iz, iy);
        for (int64_t iy = 0; iy < y; ++iy) {
            if (iy + radius < y) fill_ring(iz, iy + radius);
            fill_distances(iy);
            for (int64_t at = 0; at < rows; at += LANES) {
                V d[N_PAIRS];
                for (int pair = 0; pair < N_PAIRS; ++pair) d[pair] = load(distances + pair * rows + at);
                V least = d[0];
                for (int pair = 1; pair < N_PAIRS; ++pair) least = d[pair] < least ? d[pair] : least;
                V variance = {};
                for (int pair = 0; pair < N_PAIRS; ++pair) {
                    d[pair] = (d[pair] - least) * per_box;
                    variance += d[pair];
                }
                visit(iy, at, d, variance * T(1.0 / N_PAIRS));
            }
        }
    }
};

int64_t sample_size(int64_t z, int64_t y, int64_t x, int64_t dilation) {
    return z * y * ((x + LANES - 1) / LANES * LANES + 2 * dilation);
}

template <typename T, typename Out>
void mind_ssc(const T* image, int64_t b, int64_t z, int64_t y, int64_t x, int64_t radius, int64_t dilation,
              int64_t scratch_size, double least, double most, T* scratch, double* sums, Out* out, int threads) {
    typedef typename Vector<T>::type V;
    const int64_t size = z * y * x, padded = sample_size(z, y, x, dilation);
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        T* own = scratch + omp_get_thread_num() * scratch_size;
#else
        T* own = scratch;
#endif
#pragma omp for schedule(dynamic)
        for (int64_t plane = 0; plane < b * z; ++plane) {
            const Sweep<T> sweep(image + plane / z * padded, z, y, x, radius, dilation, own);
            double sum = 0;
            sweep.plane(plane % z, [&](int64_t, int64_t at, const V*, const V& variance) {
                const int64_t count = x - at < LANES ? x - at : LANES;
                for (int64_t lane = 0; lane < count; ++lane) sum += static_cast<double>(variance[lane]);
            });
            sums[plane] = sum;
        }
#pragma omp for schedule(dynamic)
        for (int64_t plane = 0; plane < b * z; ++plane) {
            const int64_t sample = plane / z, iz = plane % z;
            double sum = 0;  // in the order of the planes, whichever thread computed them
            for (int64_t i = 0; i < z; ++i) sum += sums[sample * z + i];
            const T overall = static_cast<T>(sum / static_cast<double>(size));
            // A NaN anywhere makes the mean NaN, and this makes the whole sample NaN, as in the definition.
            const T poison = overall - overall;
            const T tiny = std::numeric_limits<T>::min();
            const T floor = T(least) * overall > tiny ? T(least) * overall : tiny, ceiling = T(most) * overall;
            const Sweep<T> sweep(image + sample * padded, z, y, x, radius, dilation, own);
            sweep.plane(iz, [&](int64_t iy, int64_t at, const V* d, const V& mean) {
                V variance = mean > ceiling ? V{} + ceiling : mean;
                variance = variance < floor ? V{} + floor : variance;
                const V factor = T(-1) / variance + poison;
                for (int pair = 0; pair < N_PAIRS; ++pair) {
                    V similarity = d[pair] * factor;
                    exponential(similarity);
                    write<T>(out, ((sample * N_PAIRS + pair) * z + iz) * y * x + iy * x + at, similarity, x - at);
                }
            });
        }
    }
}

}  // namespace

extern "C" {

// store: 0 float32, 1 float16, 2 uint8 (x 255).
void mind_ssc_f32(const float* image, int64_t b, int64_t z, int64_t y, int64_t x, int64_t radius, int64_t dilation,
                  int64_t scratch_size, double least, double most, float* scratch, double* sums, void* out, int store,
                  int threads) {
    if (store == 1) {
        mind_ssc(image, b, z, y, x, radius, dilation, scratch_size, least, most, scratch, sums,
                 static_cast<uint16_t*>(out), threads);
    } else if (store == 2) {
        mind_ssc(image, b, z, y, x, radius, dilation, scratch_size, least, most, scratch, sums,
                 static_cast<uint8_t*>(out), threads);
    } else {
        mind_ssc(image, b, z, y, x, radius, dilation, scratch_size, least, most, scratch, sums,
                 static_cast<float*>(out), threads);
    }
}

void mind_ssc_f64(const double* image, int64_t b, int64_t z, int64_t y, int64_t x, int64_t radius, int64_t dilation,
                  int64_t scratch_size, double least, double most, double* scratch, double* sums, void* out, int,
                  int threads) {
    mind_ssc(image, b, z, y, x, radius, dilation, scratch_size, least, most, scratch, sums, static_cast<double*>(out),
             threads);
}
}
