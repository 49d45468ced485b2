// Squared feature distances to all displacements, and their box means. A thread takes all voxels of one displacement
// along z and y and of a group of displacements along x: their volumes stay in its cache until they are smoothed.
//
// A row of fixed voxels meets a row of moving voxels: for each channel, eight voxels of the fixed row are multiplied
// with as many of the moving row at every displacement of the group, each product sum in its own register. Distances
// are |f|^2 + |m|^2 - 2 f.m, of features around their mean.

#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;

template <typename T>
struct Vector {
    typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};

template <typename T>
inline void load(typename Vector<T>::type& v, const T* from) {
    std::memcpy(&v, from, sizeof v);
}

template <typename T>
inline void store(T* to, const typename Vector<T>::type& v) {
    std::memcpy(to, &v, sizeof v);
}

template <typename T>
struct Sizes {
    int64_t c, z, y, x, reach, smoothing, passes;
    int64_t rows, wide;  // voxels of a fixed and of a moving row, with what fills them up
    bool zero;           // beyond the border
    T scale;
};

// Costs of one row at GROUP displacements along x, the first at moving[0]; `volume` apart in `to`.
template <int GROUP, typename T>
void correlate_row(const T* fixed, const T* moving, const T* fixed_norm, const T* moving_norm, const Sizes<T>& s,
                   int64_t volume, T* to) {
    typedef typename Vector<T>::type V;
    for (int64_t at = 0; at < s.rows; at += LANES) {
        V sums[GROUP] = {};
        for (int64_t c = 0; c < s.c; ++c) {
            V f, m;
            load(f, fixed + c * s.rows + at);
#pragma GCC unroll 8
            for (int g = 0; g < GROUP; ++g) {
                load(m, moving + c * s.wide + at + g);
                sums[g] += f * m;
            }
        }
        V ff, mm;
        load(ff, fixed_norm + at);
        for (int g = 0; g < GROUP; ++g) {
            load(mm, moving_norm + at + g);
            V cost = (ff + mm - T(2) * sums[g]) * s.scale;
            cost = cost < T(0) ? V{} : cost;  // rounding may go below
            store(to + g * volume + at, cost);
        }
    }
}

template <typename T>
using RowFunction = void (*)(const T*, const T*, const T*, const T*, const Sizes<T>&, int64_t, T*);

template <typename T>
RowFunction<T> row_function(int64_t group) {
    static const RowFunction<T> functions[] = {correlate_row<1, T>, correlate_row<2, T>, correlate_row<3, T>,
                                               correlate_row<4, T>, correlate_row<5, T>, correlate_row<6, T>,
                                               correlate_row<7, T>, correlate_row<8, T>};
    return functions[group - 1];
}

// to[0..count) = the sum of n rows.
template <typename T>
void sum_rows(const T* const* rows, int64_t n, int64_t count, T* to) {
    typedef typename Vector<T>::type V;
    if (n == 3) {  // radius 1, nearly always
        for (int64_t at = 0; at < count; at += LANES) {
            V a, b, c;
            load(a, rows[0] + at);
            load(b, rows[1] + at);
            load(c, rows[2] + at);
            store(to + at, a + b + c);
        }
        return;
    }
    for (int64_t at = 0; at < count; at += LANES) {
        V sum, v;
        load(sum, rows[0] + at);
        for (int64_t k = 1; k < n; ++k) {
            load(v, rows[k] + at);
            sum += v;
        }
        store(to + at, sum);
    }
}

// to[0..count) = sum over k in [i - r, i + r] of from[k * stride ...]; k beyond [0, size) is clamped or left out.
template <typename T>
void box_rows(const T* from, int64_t i, int64_t size, int64_t stride, int64_t count, const Sizes<T>& s, const T** rows,
              T* to) {
    int64_t n = 0;
    for (int64_t k = i - s.smoothing; k <= i + s.smoothing; ++k) {
        if (s.zero && (k < 0 || k >= size)) continue;
        rows[n++] = from + (k < 0 ? 0 : k >= size ? size - 1 : k) * stride;
    }
    sum_rows(rows, n, count, to);
}

// In place: each row becomes its sums over 2r + 1 voxels, by way of `line`.
template <typename T>
void box_along_x(T* volume, const Sizes<T>& s, T* line, const T** rows) {
    const int64_t r = s.smoothing;
    for (int64_t k = 0; k <= 2 * r; ++k) rows[k] = line + k;
    for (T* row = volume; row < volume + s.z * s.y * s.rows; row += s.rows) {
        std::memcpy(line + r, row, s.x * sizeof(T));
        for (int64_t k = 0; k < r; ++k) {
            line[k] = s.zero ? T(0) : row[0];
            line[r + s.x + k] = s.zero ? T(0) : row[s.x - 1];
        }
        sum_rows(rows, 2 * r + 1, s.rows, row);
    }
}

inline void convert(const float* from, uint16_t* to) {
#ifdef __F16C__
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int lane = 0; lane < LANES; ++lane) {
        const _Float16 half = static_cast<_Float16>(from[lane]);
        std::memcpy(to + lane, &half, sizeof half);
    }
#endif
}

template <typename T>
void write_row(const T* from, int64_t x, T* out) {
    std::memcpy(out, from, x * sizeof(T));
}

void write_row(const float* from, int64_t x, uint16_t* out) {
    int64_t at = 0;
    for (; at + LANES <= x; at += LANES) convert(from + at, out + at);
    if (at < x) {
        uint16_t halves[LANES];
        convert(from + at, halves);  // rows of `from` are filled up to whole vectors
        std::memcpy(out + at, halves, (x - at) * sizeof(uint16_t));
    }
}

// Box means of one volume of costs, to its place in the result. `other` is scratch of the same size.
template <typename T, typename Out>
void smooth(T* volume, T* other, T* line, const Sizes<T>& s, const T** rows, Out* out) {
    const int64_t plane = s.y * s.rows;
    for (int64_t pass = 0; pass < s.passes; ++pass) {
        box_along_x(volume, s, line, rows);
        for (int64_t iz = 0; iz < s.z; ++iz) {
            for (int64_t iy = 0; iy < s.y; ++iy) {
                box_rows(volume + iz * plane, iy, s.y, s.rows, s.rows, s, rows, other + iz * plane + iy * s.rows);
            }
        }
        for (int64_t iz = 0; iz < s.z; ++iz) {
            box_rows(other, iz, s.z, plane, plane, s, rows, volume + iz * plane);
        }
    }
    for (int64_t row = 0; row < s.z * s.y; ++row) write_row(volume + row * s.rows, s.x, out + row * s.x);
}

template <typename T, typename Out>
void cost_volume(const T* fixed, const T* moving, const T* fixed_norm, const T* moving_norm, int64_t b, Sizes<T> s,
                 int64_t groups, int64_t scratch_size, T* scratch, Out* out, int threads) {
    const int64_t side = 2 * s.reach + 1, volume = s.z * s.y * s.rows, voxels = s.z * s.y * s.x;
    const int64_t tall = s.z + 2 * s.reach, deep = s.y + 2 * s.reach;  // of the padded moving volume
    const int64_t most = (side + groups - 1) / groups;
    const T box = static_cast<T>((2 * s.smoothing + 1) * (2 * s.smoothing + 1) * (2 * s.smoothing + 1));
    for (int64_t pass = 0; pass < s.passes; ++pass) s.scale /= box;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < b * side * side * groups; ++task) {
#ifdef _OPENMP
        T* costs = scratch + omp_get_thread_num() * scratch_size;
#else
        T* costs = scratch;
#endif
        T *other = costs + most * volume, *line = other + volume;
        std::vector<const T*> rows(2 * s.smoothing + 1);
        const int64_t first = task % groups * side / groups, last = (task % groups + 1) * side / groups;
        const int64_t jy = task / groups % side, jz = task / groups / side % side, sample = task / groups / side / side;
        const RowFunction<T> correlate = row_function<T>(last - first);
        for (int64_t iz = 0; iz < s.z; ++iz) {
            for (int64_t iy = 0; iy < s.y; ++iy) {
                const int64_t here = (sample * s.z + iz) * s.y + iy;
                const int64_t there = (sample * tall + iz + jz) * deep + iy + jy;
                correlate(fixed + here * s.c * s.rows, moving + there * s.c * s.wide + first, fixed_norm + here * s.rows,
                          moving_norm + there * s.wide + first, s, volume, costs + (iz * s.y + iy) * s.rows);
            }
        }
        for (int64_t jx = first; jx < last; ++jx) {
            const int64_t label = (jz * side + jy) * side + jx;
            smooth(costs + (jx - first) * volume, other, line, s, rows.data(), out + (sample * side * side * side + label) * voxels);
        }
    }
}

template <typename T>
Sizes<T> sizes(int64_t c, int64_t z, int64_t y, int64_t x, int64_t reach, int64_t smoothing, int64_t passes, int zero,
               double scale) {
    const int64_t rows = (x + LANES - 1) / LANES * LANES;
    return {c, z, y, x, reach, smoothing, passes, rows, rows + 2 * reach, zero != 0, static_cast<T>(scale)};
}

}  // namespace

extern "C" {

// fixed [b, z, y, c, rows], moving [b, z + 2 reach, y + 2 reach, c, rows + 2 reach], norms the same without c.
void cost_volume_f32(const float* fixed, const float* moving, const float* fixed_norm, const float* moving_norm,
                     int64_t b, int64_t c, int64_t z, int64_t y, int64_t x, int64_t reach, int64_t groups,
                     int64_t smoothing, int64_t passes, int64_t scratch_size, int zero, double scale, float* scratch,
                     void* out, int half, int threads) {
    const Sizes<float> s = sizes<float>(c, z, y, x, reach, smoothing, passes, zero, scale);
    if (half) {
        cost_volume(fixed, moving, fixed_norm, moving_norm, b, s, groups, scratch_size, scratch,
                    static_cast<uint16_t*>(out), threads);
    } else {
        cost_volume(fixed, moving, fixed_norm, moving_norm, b, s, groups, scratch_size, scratch,
                    static_cast<float*>(out), threads);
    }
}

void cost_volume_f64(const double* fixed, const double* moving, const double* fixed_norm, const double* moving_norm,
                     int64_t b, int64_t c, int64_t z, int64_t y, int64_t x, int64_t reach, int64_t groups,
                     int64_t smoothing, int64_t passes, int64_t scratch_size, int zero, double scale, double* scratch,
                     void* out, int, int threads) {
    const Sizes<double> s = sizes<double>(c, z, y, x, reach, smoothing, passes, zero, scale);
    cost_volume(fixed, moving, fixed_norm, moving_norm, b, s, groups, scratch_size, scratch, static_cast<double*>(out),
                threads);
}
}
