// Warp by a displacement field, its regularisers, and their gradients; definitions in reference.py.
//
// Rows along x are the unit of work: coordinates, weights and offsets of a chunk go to buffers in the first cache, then
// each channel gathers its eight taps. The gradient in u is gathered too; only what spreads (folding, the gradient in
// the image) is added, by the thread that owns the planes of the result, in the order of the voxels it comes from. So
// every result has the same bits for any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t CHUNK = 64;

struct Grid {
    int64_t b, c, z, y, x;
    int64_t plane() const { return y * x; }
    int64_t volume() const { return z * y * x; }
};

// Where v + u of a chunk lies along one axis: offsets of the two taps, weights, derivatives of the weights.
template <typename T>
struct Taps {
    int32_t low[CHUNK], high[CHUNK];
    T w0[CHUNK], w1[CHUNK], d0[CHUNK], d1[CHUNK];
};

template <typename T, bool BORDER>
void locate(Taps<T>& t, const T* u, int64_t start, int64_t step, int64_t size, int64_t stride, int64_t n) {
    const int32_t low = BORDER ? 0 : -1, last = int32_t(size) - 1, high = BORDER ? last : last + 1;
    const int32_t pitch = int32_t(stride), first = int32_t(start), by = int32_t(step);
    const T reach = T(size + 1);
#pragma omp simd
    for (int32_t i = 0; i < int32_t(n); ++i) {
        // Cell and fraction from u alone: v + u in float would round the fraction to 1e-5 voxel at v = 160.
        const T floor = std::floor(u[i]), f = u[i] - floor;
        const T held = floor > -reach ? (floor < reach ? floor : reach) : -reach;  // NaN as well
        const int32_t cell = first + by * i + int32_t(held);
        const bool inside = (cell >= low) & (cell < high) & ((cell > low) | (f > 0));
        const int32_t index = std::min(std::max(cell, low), high);
        const T fraction = u[i] == u[i] ? (inside ? f : T(0)) : u[i];
        const T in0 = BORDER || ((index >= 0) & (index <= last)) ? T(1) : T(0);
        const T in1 = BORDER || index < last ? T(1) : T(0);
        t.low[i] = std::min(std::max(index, 0), last) * pitch;
        t.high[i] = std::min(index + 1, last) * pitch;
        t.w0[i] = (T(1) - fraction) * in0;
        t.w1[i] = fraction * in1;
        t.d0[i] = inside ? -in0 : T(0);
        t.d1[i] = inside ? in1 : T(0);
    }
}

template <typename T>
struct Row {
    Taps<T> x, y, z;
};

template <typename T, bool BORDER>
void locate_row(Row<T>& row, const T* u, const Grid& g, int64_t z, int64_t y, int64_t x, int64_t n) {
    const int64_t at = (z * g.y + y) * g.x + x;
    locate<T, BORDER>(row.x, u + at, x, 1, g.x, 1, n);
    locate<T, BORDER>(row.y, u + g.volume() + at, y, 0, g.y, g.x, n);
    locate<T, BORDER>(row.z, u + 2 * g.volume() + at, z, 0, g.z, g.plane(), n);
}

// Rows of u around row (z, y): the neighbours along y and z, held at the border, where differences to them are 0.
template <typename T>
struct Around {
    const T* row[3][3];  // by z - 1, z, z + 1 and y - 1, y, y + 1
};

template <typename T>
Around<T> around(const T* field, const Grid& g, int64_t z, int64_t y) {
    Around<T> a;
    for (int dz = -1; dz <= 1; ++dz)
        for (int dy = -1; dy <= 1; ++dy) {
            const int64_t zz = std::min(std::max(z + dz, int64_t(0)), g.z - 1);
            const int64_t yy = std::min(std::max(y + dy, int64_t(0)), g.y - 1);
            a.row[dz + 1][dy + 1] = field + (zz * g.y + yy) * g.x;
        }
    return a;
}

// Calls body(x, x - 1, x + 1), held at the border: the inside vectorised, the ends apart.
template <typename Body>
inline void along(int64_t size, Body body) {
    body(int64_t(0), int64_t(0), std::min(int64_t(1), size - 1));
#pragma omp simd
    for (int64_t x = 1; x < size - 1; ++x) body(x, x - 1, x + 1);
    if (size > 1) body(size - 1, size - 2, size - 1);
}

template <typename T>
T step_of(int64_t i, int64_t size) {  // 1 / (distance of the neighbours), 0 along an axis of one voxel
    return size == 1 ? T(0) : (i == 0 || i == size - 1 ? T(1) : T(0.5));
}

// J = I + grad u along row (z, y), nine rows of `jacobian`, and its determinant.
template <typename T>
void jacobian_row(const T* u, const Grid& g, int64_t z, int64_t y, T* jacobian, T* det) {
    const T hz = step_of<T>(z, g.z), hy = step_of<T>(y, g.y), h0 = step_of<T>(0, g.x), hx = T(0.5);
    for (int i = 0; i < 3; ++i) {
        const Around<T> a = around(u + i * g.volume(), g, z, y);
        const T *centre = a.row[1][1], *ym = a.row[1][0], *yp = a.row[1][2], *zm = a.row[0][1], *zp = a.row[2][1];
        T *jx = jacobian + (3 * i) * g.x, *jy = jx + g.x, *jz = jy + g.x;
        const T ex = i == 0 ? 1 : 0, ey = i == 1 ? 1 : 0, ez = i == 2 ? 1 : 0;
#pragma omp simd
        for (int64_t x = 0; x < g.x; ++x) {
            jy[x] = (yp[x] - ym[x]) * hy + ey;
            jz[x] = (zp[x] - zm[x]) * hz + ez;
        }
#pragma omp simd
        for (int64_t x = 1; x < g.x - 1; ++x) jx[x] = (centre[x + 1] - centre[x - 1]) * hx + ex;
        jx[0] = (centre[std::min(int64_t(1), g.x - 1)] - centre[0]) * h0 + ex;
        jx[g.x - 1] = (centre[g.x - 1] - centre[std::max(g.x - 2, int64_t(0))]) * h0 + ex;
    }
    const T* j = jacobian;
    const int64_t n = g.x;
#pragma omp simd
    for (int64_t x = 0; x < n; ++x)
        det[x] = j[x] * (j[4 * n + x] * j[8 * n + x] - j[5 * n + x] * j[7 * n + x]) +
                 j[n + x] * (j[5 * n + x] * j[6 * n + x] - j[3 * n + x] * j[8 * n + x]) +
                 j[2 * n + x] * (j[3 * n + x] * j[7 * n + x] - j[4 * n + x] * j[6 * n + x]);
}

template <typename T>
inline T square(T v) {
    return v * v;
}

// Factors of squared differences in voxels: (s_i / s_j)^2 of first derivatives, (s_i / (s_j s_k))^2 of second ones.
struct Factors {
    double first[3][3], second[3][3][3];
    explicit Factors(const double* s) {
        for (int i = 0; i < 3; ++i)
            for (int j = 0; j < 3; ++j) {
                first[i][j] = square(s[i] / s[j]);
                for (int k = 0; k < 3; ++k) second[i][j][k] = square(s[i] / (s[j] * s[k]));
            }
    }
};

// Weights of the voxels, or 1 for all.
template <typename T, bool WEIGHTED>
inline T at(const T* weight, int64_t x) {
    return WEIGHTED ? weight[x] : T(1);
}

template <typename T, bool WEIGHTED>
double folding_row(const T* det, const T* weight, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t x = 0; x < n; ++x) {
        const T w = at<T, WEIGHTED>(weight, x);
        sum += det[x] >= 0 ? 0.0 : double(-det[x] * w);  // NaN is kept
    }
    return sum;
}

// Differences of row (z, y) to its neighbours before it along x, y and z.
template <typename T, bool WEIGHTED>
double diffusion_row(const T* u, const T* weight, const Grid& g, const Factors& k, int64_t z, int64_t y) {
    double total = 0;
    const Around<T> w = around(weight, g, z, y);
    const T *w0 = w.row[1][1], *wy = w.row[1][0], *wz = w.row[0][1];
    for (int i = 0; i < 3; ++i) {
        const Around<T> a = around(u + i * g.volume(), g, z, y);
        const T *c = a.row[1][1], *ym = a.row[1][0], *zm = a.row[0][1];
        const T kx = T(k.first[i][0] / 2), ky = T(k.first[i][1] / 2), kz = T(k.first[i][2] / 2);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t x = 1; x < g.x; ++x) {
            const T w1 = at<T, WEIGHTED>(w0, x);
            sum += double(kx * (w1 + at<T, WEIGHTED>(w0, x - 1)) * square(c[x] - c[x - 1]) +
                          ky * (w1 + at<T, WEIGHTED>(wy, x)) * square(c[x] - ym[x]) +
                          kz * (w1 + at<T, WEIGHTED>(wz, x)) * square(c[x] - zm[x]));
        }
        const T w1 = at<T, WEIGHTED>(w0, 0);
        total += sum + double(ky * (w1 + at<T, WEIGHTED>(wy, 0)) * square(c[0] - ym[0]) +
                              kz * (w1 + at<T, WEIGHTED>(wz, 0)) * square(c[0] - zm[0]));
    }
    return total;
}

template <typename T, bool WEIGHTED>
double bending_row(const T* u, const T* weight, const Grid& g, const Factors& k, int64_t z, int64_t y) {
    double sum = 0;
    const bool inner_y = y > 0 && y < g.y - 1, inner_z = z > 0 && z < g.z - 1;
    const Around<T> w = around(weight, g, z, y);
    const T *w0 = w.row[1][1], *wy = w.row[1][0], *wz = w.row[0][1], *wyz = w.row[0][0];
    for (int i = 0; i < 3; ++i) {
        const Around<T> a = around(u + i * g.volume(), g, z, y);
        const T *c = a.row[1][1], *ym = a.row[1][0], *yp = a.row[1][2], *zm = a.row[0][1], *zp = a.row[2][1];
        const T* yzm = a.row[0][0];
        const T kyy = inner_y ? T(k.second[i][1][1]) : T(0), kzz = inner_z ? T(k.second[i][2][2]) : T(0);
        const T kyz = T(k.second[i][1][2] / 2);
        const T kxx = T(k.second[i][0][0]), kxy = T(k.second[i][0][1] / 2), kxz = T(k.second[i][0][2] / 2);
#pragma omp simd reduction(+ : sum)
        for (int64_t x = 0; x < g.x; ++x) {
            const T w1 = at<T, WEIGHTED>(w0, x);
            const T corners = w1 + at<T, WEIGHTED>(wy, x) + at<T, WEIGHTED>(wz, x) + at<T, WEIGHTED>(wyz, x);
            sum += double(w1 * (kyy * square(ym[x] - 2 * c[x] + yp[x]) + kzz * square(zm[x] - 2 * c[x] + zp[x])) +
                          kyz * corners * square((c[x] - ym[x]) - (zm[x] - yzm[x])));
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t x = 1; x < g.x; ++x) {
            const T pair = at<T, WEIGHTED>(w0, x) + at<T, WEIGHTED>(w0, x - 1);
            const T d = c[x] - c[x - 1];
            sum += double(kxy * (pair + at<T, WEIGHTED>(wy, x) + at<T, WEIGHTED>(wy, x - 1)) *
                              square(d - (ym[x] - ym[x - 1])) +
                          kxz * (pair + at<T, WEIGHTED>(wz, x) + at<T, WEIGHTED>(wz, x - 1)) *
                              square(d - (zm[x] - zm[x - 1])));
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t x = 1; x < g.x - 1; ++x)
            sum += double(kxx * at<T, WEIGHTED>(w0, x) * square(c[x - 1] - 2 * c[x] + c[x + 1]));
    }
    return sum;
}

template <typename T, bool WEIGHTED>
void diffusion_gradient_row(const T* u, const T* weight, const Grid& g, const Factors& k, T scale, int64_t z,
                            int64_t y, T* gradient) {
    const Around<T> w = around(weight, g, z, y);
    const T *w0 = w.row[1][1], *wym = w.row[1][0], *wyp = w.row[1][2], *wzm = w.row[0][1], *wzp = w.row[2][1];
    for (int i = 0; i < 3; ++i) {
        const Around<T> a = around(u + i * g.volume(), g, z, y);
        const T *c = a.row[1][1], *ym = a.row[1][0], *yp = a.row[1][2], *zm = a.row[0][1], *zp = a.row[2][1];
        const T kx = scale * T(k.first[i][0]), ky = scale * T(k.first[i][1]), kz = scale * T(k.first[i][2]);
        T* out = gradient + i * g.volume() + (z * g.y + y) * g.x;
        along(g.x, [=](int64_t x, int64_t xm, int64_t xp) {
            const T w1 = at<T, WEIGHTED>(w0, x);
            out[x] += kx * ((w1 + at<T, WEIGHTED>(w0, xm)) * (c[x] - c[xm]) +
                            (w1 + at<T, WEIGHTED>(w0, xp)) * (c[x] - c[xp])) +
                      ky * ((w1 + at<T, WEIGHTED>(wym, x)) * (c[x] - ym[x]) +
                            (w1 + at<T, WEIGHTED>(wyp, x)) * (c[x] - yp[x])) +
                      kz * ((w1 + at<T, WEIGHTED>(wzm, x)) * (c[x] - zm[x]) +
                            (w1 + at<T, WEIGHTED>(wzp, x)) * (c[x] - zp[x]));
        });
    }
}

// Second differences along one axis reach two voxels far: their gradient from five rows, with the flags of those that
// lie inside.
template <typename T, bool WEIGHTED>
void straight_gradient_row(const T* const u[5], const T* const w[3], const T k[3], int64_t n, T* out) {
    const T *a = u[0], *b = u[1], *c = u[2], *d = u[3], *e = u[4], *wm = w[0], *w0 = w[1], *wp = w[2];
    const T km = k[0], k0 = k[1], kp = k[2];
#pragma omp simd
    for (int64_t x = 0; x < n; ++x)
        out[x] += km * at<T, WEIGHTED>(wm, x) * (a[x] - 2 * b[x] + c[x]) -
                  2 * k0 * at<T, WEIGHTED>(w0, x) * (b[x] - 2 * c[x] + d[x]) +
                  kp * at<T, WEIGHTED>(wp, x) * (c[x] - 2 * d[x] + e[x]);
}

template <typename T, bool WEIGHTED>
void bending_gradient_row(const T* u, const T* weight, const Grid& g, const Factors& k, T scale, int64_t z, int64_t y,
                          T* gradient, T* buffer) {
    const Around<T> w = around(weight, g, z, y);
    for (int i = 0; i < 3; ++i) {
        const T* field = u + i * g.volume();
        T* out = gradient + i * g.volume() + (z * g.y + y) * g.x;
        const Around<T> a = around(field, g, z, y);
        for (int axis = 1; axis <= 2; ++axis) {
            const int64_t size = axis == 1 ? g.y : g.z, at_axis = axis == 1 ? y : z;
            const T *rows[5], *weights[3];
            T factor[3];
            for (int64_t s = -2; s <= 2; ++s) {
                const int64_t there = std::min(std::max(at_axis + s, int64_t(0)), size - 1);
                const int64_t at_row = axis == 1 ? z * g.y + there : there * g.y + y;
                rows[s + 2] = field + at_row * g.x;
                if (s >= -1 && s <= 1) {
                    weights[s + 1] = weight + at_row * g.x;
                    const bool inner = at_axis + s > 0 && at_axis + s < size - 1;
                    factor[s + 1] = inner ? 2 * scale * T(k.second[i][axis][axis]) : T(0);
                }
            }
            straight_gradient_row<T, WEIGHTED>(rows, weights, factor, g.x, out);
        }
        const T* c = a.row[1][1];
        const T kxx = 2 * scale * T(k.second[i][0][0]);
        // buffer[x + 1] is w u_xx at x, 0 at the ends.
        buffer[0] = buffer[1] = buffer[g.x] = buffer[g.x + 1] = 0;
#pragma omp simd
        for (int64_t x = 1; x < g.x - 1; ++x)
            buffer[x + 1] = kxx * at<T, WEIGHTED>(w.row[1][1], x) * (c[x - 1] - 2 * c[x] + c[x + 1]);
#pragma omp simd
        for (int64_t x = 0; x < g.x; ++x) out[x] += buffer[x] - 2 * buffer[x + 1] + buffer[x + 2];
        // Each mixed difference, seen from this voxel as u - u_j - u_k + u_jk, enters its gradient with a plus.
        const T kyz = scale * T(k.second[i][1][2]);
        for (int side = 0; side < 4; ++side) {
            const int dz = side & 2, dy = (side & 1) * 2;
            const T *uy = a.row[1][dy], *uz = a.row[dz][1], *uyz = a.row[dz][dy];
            const T *w0 = w.row[1][1], *wy = w.row[1][dy], *wz = w.row[dz][1], *wyz = w.row[dz][dy];
#pragma omp simd
            for (int64_t x = 0; x < g.x; ++x)
                out[x] += kyz *
                          (at<T, WEIGHTED>(w0, x) + at<T, WEIGHTED>(wy, x) + at<T, WEIGHTED>(wz, x) +
                           at<T, WEIGHTED>(wyz, x)) *
                          ((c[x] - uy[x]) - (uz[x] - uyz[x]));
        }
        for (int side = 0; side < 4; ++side) {
            const bool along_y = side < 2;
            const int d = (side & 1) * 2;
            const T *other = along_y ? a.row[1][d] : a.row[d][1], *wo = along_y ? w.row[1][d] : w.row[d][1];
            const T* w0 = w.row[1][1];
            const T kx = scale * T(k.second[i][0][along_y ? 1 : 2]);
            along(g.x, [=](int64_t x, int64_t xm, int64_t xp) {
                const T here = c[x] - other[x], pair = at<T, WEIGHTED>(w0, x) + at<T, WEIGHTED>(wo, x);
                out[x] += kx * ((pair + at<T, WEIGHTED>(w0, xm) + at<T, WEIGHTED>(wo, xm)) *
                                    (here - (c[xm] - other[xm])) +
                                (pair + at<T, WEIGHTED>(w0, xp) + at<T, WEIGHTED>(wo, xp)) *
                                    (here - (c[xp] - other[xp])));
            });
        }
    }
}

// Adds what the folded voxels of row (z, y) send to their neighbours in planes [first, end). `jacobian` is overwritten.
template <typename T, bool WEIGHTED>
void folding_gradient_row(const T* u, const T* weight, const Grid& g, T scale, int64_t z, int64_t y, int64_t first,
                          int64_t end, T* gradient, T* jacobian, T* det) {
    const int64_t n = g.x;
    jacobian_row(u, g, z, y, jacobian, det);
    int32_t folded = 0;
#pragma omp simd reduction(| : folded)
    for (int64_t x = 0; x < n; ++x) folded |= !(det[x] >= 0);
    if (!folded) return;
    const T* w = weight + (z * g.y + y) * n;
    T* j = jacobian;
#pragma omp simd
    for (int64_t x = 0; x < n; ++x) {  // the cofactors, d det / d J_ij, times d loss / d det
        const T s = det[x] >= 0 ? T(0) : -scale * at<T, WEIGHTED>(w, x);
        const T a = j[x], b = j[n + x], c = j[2 * n + x], d = j[3 * n + x], e = j[4 * n + x], f = j[5 * n + x];
        const T p = j[6 * n + x], q = j[7 * n + x], r = j[8 * n + x];
        j[x] = s * (e * r - f * q), j[n + x] = s * (f * p - d * r), j[2 * n + x] = s * (d * q - e * p);
        j[3 * n + x] = s * (c * q - b * r), j[4 * n + x] = s * (a * r - c * p), j[5 * n + x] = s * (b * p - a * q);
        j[6 * n + x] = s * (b * f - c * e), j[7 * n + x] = s * (c * d - a * f), j[8 * n + x] = s * (a * e - b * d);
    }
    const int64_t ym = std::max(y - 1, int64_t(0)), yp = std::min(y + 1, g.y - 1);
    const int64_t zm = std::max(z - 1, int64_t(0)), zp = std::min(z + 1, g.z - 1);
    const T hy = step_of<T>(y, g.y), hz = step_of<T>(z, g.z);
    auto add = [&](T* to, const T* from, T h) {
#pragma omp simd
        for (int64_t x = 0; x < n; ++x) to[x] += h * from[x];
    };
    for (int i = 0; i < 3; ++i) {
        T* out = gradient + i * g.volume();
        const T* from = j + 3 * i * n;
        if (z >= first && z < end) {
            T* row = out + (z * g.y + y) * n;
            for (int64_t x = 0; x < n; ++x) {
                const T step = step_of<T>(x, n) * from[x];
                row[std::max(x - 1, int64_t(0))] -= step;
                row[std::min(x + 1, n - 1)] += step;
            }
            add(out + (z * g.y + ym) * n, from + n, -hy);
            add(out + (z * g.y + yp) * n, from + n, hy);
        }
        if (zm >= first && zm < end) add(out + (zm * g.y + y) * n, from + 2 * n, -hz);
        if (zp >= first && zp < end) add(out + (zp * g.y + y) * n, from + 2 * n, hz);
    }
}

template <typename T, bool BORDER>
void warp_row(const T* image, const T* u, T fill, const Grid& g, int64_t z, int64_t y, T* warped, Row<T>& row) {
    const T shift = BORDER ? T(0) : fill;
    for (int64_t x = 0; x < g.x; x += CHUNK) {
        const int64_t n = std::min(CHUNK, g.x - x);
        locate_row<T, BORDER>(row, u, g, z, y, x, n);
        const Taps<T>&tx = row.x, &ty = row.y, &tz = row.z;
        for (int64_t c = 0; c < g.c; ++c) {
            const T* v = image + c * g.volume();
            T* out = warped + c * g.volume() + (z * g.y + y) * g.x + x;
#pragma omp simd
            for (int32_t i = 0; i < int32_t(n); ++i) {
                const int32_t a = tz.low[i] + ty.low[i], b = tz.low[i] + ty.high[i];
                const int32_t d = tz.high[i] + ty.low[i], e = tz.high[i] + ty.high[i], l = tx.low[i], h = tx.high[i];
                const T w0 = tx.w0[i], w1 = tx.w1[i];
                const T ra = w0 * (v[a + l] - shift) + w1 * (v[a + h] - shift);
                const T rb = w0 * (v[b + l] - shift) + w1 * (v[b + h] - shift);
                const T rd = w0 * (v[d + l] - shift) + w1 * (v[d + h] - shift);
                const T re = w0 * (v[e + l] - shift) + w1 * (v[e + h] - shift);
                out[i] = tz.w0[i] * (ty.w0[i] * ra + ty.w1[i] * rb) + tz.w1[i] * (ty.w0[i] * rd + ty.w1[i] * re) +
                         shift;
            }
        }
    }
}

// d loss / d u of the warp alone: the same eight taps, weighted by the derivatives of their weights.
template <typename T, bool BORDER>
void warp_gradient_row(const T* image, const T* u, const T* grad_warped, T fill, const Grid& g, int64_t z, int64_t y,
                       T* gradient, Row<T>& row) {
    const T shift = BORDER ? T(0) : fill;
    for (int64_t x = 0; x < g.x; x += CHUNK) {
        const int64_t n = std::min(CHUNK, g.x - x), at_row = (z * g.y + y) * g.x + x;
        locate_row<T, BORDER>(row, u, g, z, y, x, n);
        const Taps<T>&tx = row.x, &ty = row.y, &tz = row.z;
        T *gx = gradient + at_row, *gy = gx + g.volume(), *gz = gy + g.volume();
        for (int64_t i = 0; i < n; ++i) gx[i] = gy[i] = gz[i] = 0;
        for (int64_t c = 0; c < g.c; ++c) {
            const T *v = image + c * g.volume(), *grad = grad_warped + c * g.volume() + at_row;
#pragma omp simd
            for (int32_t i = 0; i < int32_t(n); ++i) {
                const int32_t a = tz.low[i] + ty.low[i], b = tz.low[i] + ty.high[i];
                const int32_t d = tz.high[i] + ty.low[i], e = tz.high[i] + ty.high[i], l = tx.low[i], h = tx.high[i];
                const T al = v[a + l] - shift, ah = v[a + h] - shift, bl = v[b + l] - shift, bh = v[b + h] - shift;
                const T dl = v[d + l] - shift, dh = v[d + h] - shift, el = v[e + l] - shift, eh = v[e + h] - shift;
                const T wx0 = tx.w0[i], wx1 = tx.w1[i], dx0 = tx.d0[i], dx1 = tx.d1[i];
                const T wy0 = ty.w0[i], wy1 = ty.w1[i], wz0 = tz.w0[i], wz1 = tz.w1[i];
                const T ra = wx0 * al + wx1 * ah, rb = wx0 * bl + wx1 * bh;
                const T rd = wx0 * dl + wx1 * dh, re = wx0 * el + wx1 * eh;
                const T low = wz0 * ra + wz1 * rd, high = wz0 * rb + wz1 * re;
                gx[i] += grad[i] * (wz0 * (wy0 * (dx0 * al + dx1 * ah) + wy1 * (dx0 * bl + dx1 * bh)) +
                                    wz1 * (wy0 * (dx0 * dl + dx1 * dh) + wy1 * (dx0 * el + dx1 * eh)));
                gy[i] += grad[i] * (ty.d0[i] * low + ty.d1[i] * high);
                gz[i] += grad[i] * (tz.d0[i] * (wy0 * ra + wy1 * rb) + tz.d1[i] * (wy0 * rd + wy1 * re));
            }
        }
    }
}

enum Terms { NONE = 0, FIRST = 1, BENDING = 2 };  // BENDING: also

template <typename T, bool BORDER, bool WEIGHTED>
void forward(const T* image, const T* u, const T* weight, T fill, const double* spacing, int terms, const Grid& g,
             T* warped, double* sums, int threads) {
    const Factors k(spacing);
#pragma omp parallel num_threads(threads)
    {
        Row<T> row;
        std::vector<T> buffer(terms ? 10 * g.x : 0);
        T *jacobian = buffer.data(), *det = jacobian + 9 * g.x;
#pragma omp for schedule(static)
        for (int64_t plane = 0; plane < g.b * g.z; ++plane) {
            const int64_t b = plane / g.z, z = plane % g.z;
            const T *field = u + 3 * b * g.volume(), *w = weight + (WEIGHTED ? b * g.volume() : 0);
            double sum[3] = {0, 0, 0};
            for (int64_t y = 0; y < g.y; ++y) {
                warp_row<T, BORDER>(image + b * g.c * g.volume(), field, fill, g, z, y,
                                    warped + b * g.c * g.volume(), row);
                if (!terms) continue;
                jacobian_row(field, g, z, y, jacobian, det);
                sum[0] += folding_row<T, WEIGHTED>(det, w + (z * g.y + y) * g.x, g.x);
                sum[1] += diffusion_row<T, WEIGHTED>(field, w, g, k, z, y);
                if (terms & BENDING) sum[2] += bending_row<T, WEIGHTED>(field, w, g, k, z, y);
            }
            std::copy(sum, sum + 3, sums + 3 * plane);
        }
    }
}

template <typename T, bool BORDER, bool WEIGHTED>
void backward_field(const T* image, const T* u, const T* weight, const T* grad_warped, const double* grad_sums, T fill,
                    const double* spacing, int terms, const Grid& g, T* gradient, int threads) {
    const Factors k(spacing);
    const int64_t slabs = std::min(g.z, int64_t(threads));
#pragma omp parallel num_threads(threads)
    {
        Row<T> row;
        std::vector<T> buffer(terms ? 10 * g.x + 2 : 0);
        T *jacobian = buffer.data(), *det = jacobian + 9 * g.x;
#pragma omp for schedule(static)
        for (int64_t slab = 0; slab < g.b * slabs; ++slab) {
            const int64_t b = slab / slabs, s = slab % slabs;
            const int64_t first = s * g.z / slabs, end = (s + 1) * g.z / slabs;
            const T *volume = image + b * g.c * g.volume(), *grad = grad_warped + b * g.c * g.volume();
            const T *field = u + 3 * b * g.volume(), *w = weight + (WEIGHTED ? b * g.volume() : 0);
            const T fold = T(grad_sums[3 * b]), diffuse = T(grad_sums[3 * b + 1]), bend = T(grad_sums[3 * b + 2]);
            T* out = gradient + 3 * b * g.volume();
            // Folding in plane z adds to planes z - 1 to z + 1, so it follows one plane behind what writes them.
            for (int64_t z = first - 1; z <= end; ++z) {
                for (int64_t y = 0; y < g.y && z + 1 >= first && z + 1 < end; ++y) {
                    warp_gradient_row<T, BORDER>(volume, field, grad, fill, g, z + 1, y, out, row);
                    if (terms && diffuse != 0)
                        diffusion_gradient_row<T, WEIGHTED>(field, w, g, k, diffuse, z + 1, y, out);
                    if ((terms & BENDING) && bend != 0)
                        bending_gradient_row<T, WEIGHTED>(field, w, g, k, bend, z + 1, y, out, buffer.data());
                }
                for (int64_t y = 0; y < g.y && terms && fold != 0 && z >= 0 && z < g.z; ++y)
                    folding_gradient_row<T, WEIGHTED>(field, w, g, fold, z, y, first, end, out, jacobian, det);
            }
        }
    }
}

// Adjoint of the warp in the image. `reach` holds, per plane of u, the first and last plane of the image it touches.
template <typename T, bool BORDER>
void backward_image(const T* u, const T* grad_warped, const Grid& g, T* gradient, int64_t* reach, int threads) {
    const int64_t slabs = std::min(g.z, int64_t(threads));
    const int64_t plane = g.plane();
#pragma omp parallel num_threads(threads)
    {
        Row<T> row;
#pragma omp for schedule(static)
        for (int64_t at_plane = 0; at_plane < g.b * g.z; ++at_plane) {
            const T* uz = u + (3 * (at_plane / g.z) + 2) * g.volume() + (at_plane % g.z) * plane;
            int64_t low = g.z, high = 0;
            for (int64_t x = 0; x < plane; x += CHUNK) {
                const int64_t n = std::min(CHUNK, plane - x);
                locate<T, BORDER>(row.z, uz + x, at_plane % g.z, 0, g.z, 1, n);
                for (int64_t i = 0; i < n; ++i) {
                    low = std::min(low, int64_t(row.z.low[i]));
                    high = std::max(high, int64_t(row.z.high[i]));
                }
            }
            reach[2 * at_plane] = low;
            reach[2 * at_plane + 1] = high;
        }
#pragma omp for schedule(static)
        for (int64_t slab = 0; slab < g.b * slabs; ++slab) {
            const int64_t b = slab / slabs, s = slab % slabs;
            const int64_t first = s * g.z / slabs, end = (s + 1) * g.z / slabs;
            T* out = gradient + b * g.c * g.volume();
            for (int64_t c = 0; c < g.c; ++c)
                std::fill(out + c * g.volume() + first * plane, out + c * g.volume() + end * plane, T(0));
            for (int64_t z = 0; z < g.z; ++z) {
                if (reach[2 * (b * g.z + z)] >= end || reach[2 * (b * g.z + z) + 1] < first) continue;
                for (int64_t at_row = 0; at_row < plane; at_row += g.x)
                    for (int64_t x = 0; x < g.x; x += CHUNK) {
                        const int64_t n = std::min(CHUNK, g.x - x);
                        locate_row<T, BORDER>(row, u + 3 * b * g.volume(), g, z, at_row / g.x, x, n);
                        const Taps<T>&tx = row.x, &ty = row.y, &tz = row.z;
                        for (int64_t c = 0; c < g.c; ++c) {
                            const T* from = grad_warped + (b * g.c + c) * g.volume() + z * plane + at_row + x;
                            T* to = out + c * g.volume();
                            for (int64_t i = 0; i < n; ++i)
                                for (int side = 0; side < 2; ++side) {
                                    const int64_t zz = side ? tz.high[i] : tz.low[i];
                                    if (zz < first * plane || zz >= end * plane) continue;
                                    const T v = from[i] * (side ? tz.w1[i] : tz.w0[i]);
                                    T *low = to + zz + ty.low[i], *high = to + zz + ty.high[i];
                                    low[tx.low[i]] += v * ty.w0[i] * tx.w0[i];
                                    low[tx.high[i]] += v * ty.w0[i] * tx.w1[i];
                                    high[tx.low[i]] += v * ty.w1[i] * tx.w0[i];
                                    high[tx.high[i]] += v * ty.w1[i] * tx.w1[i];
                                }
                        }
                    }
            }
        }
    }
}

// Calls with the compile-time choices; without weights, u stands in for the pointer that is never read.
#define CHOOSE(T, call)                                                       \
    do {                                                                      \
        const T* w = weight ? weight : u;                                     \
        if (border) weight ? call<T, true, true> ARGS : call<T, true, false> ARGS;    \
        else weight ? call<T, false, true> ARGS : call<T, false, false> ARGS; \
    } while (0)

template <typename T>
void forward_of(const T* image, const T* u, const T* weight, int border, double fill, const double* spacing, int terms,
                const int64_t* sizes, T* warped, double* sums, int threads) {
    const Grid g{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
#define ARGS (image, u, w, T(fill), spacing, terms, g, warped, sums, threads)
    CHOOSE(T, forward);
#undef ARGS
}

template <typename T>
void backward_field_of(const T* image, const T* u, const T* weight, const T* grad_warped, const double* grad_sums,
                       int border, double fill, const double* spacing, int terms, const int64_t* sizes, T* gradient,
                       int threads) {
    const Grid g{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
#define ARGS (image, u, w, grad_warped, grad_sums, T(fill), spacing, terms, g, gradient, threads)
    CHOOSE(T, backward_field);
#undef ARGS
}

template <typename T>
void backward_image_of(const T* u, const T* grad_warped, int border, const int64_t* sizes, T* gradient, int64_t* reach,
                       int threads) {
    const Grid g{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    if (border)
        backward_image<T, true>(u, grad_warped, g, gradient, reach, threads);
    else
        backward_image<T, false>(u, grad_warped, g, gradient, reach, threads);
}

}  // namespace

#define EXPORT(NAME, T)                                                                                               \
    extern "C" void forward_##NAME(const T* image, const T* u, const T* weight, int border, double fill,              \
                                   const double* spacing, int terms, const int64_t* sizes, T* warped, double* sums,   \
                                   int threads) {                                                                     \
        forward_of<T>(image, u, weight, border, fill, spacing, terms, sizes, warped, sums, threads);                  \
    }                                                                                                                 \
    extern "C" void backward_field_##NAME(const T* image, const T* u, const T* weight, const T* grad_warped,          \
                                          const double* grad_sums, int border, double fill, const double* spacing,    \
                                          int terms, const int64_t* sizes, T* gradient, int threads) {                \
        backward_field_of<T>(image, u, weight, grad_warped, grad_sums, border, fill, spacing, terms, sizes, gradient, \
                             threads);                                                                                \
    }                                                                                                                 \
    extern "C" void backward_image_##NAME(const T* u, const T* grad_warped, int border, const int64_t* sizes,         \
                                          T* gradient, int64_t* reach, int threads) {                                 \
        backward_image_of<T>(u, grad_warped, border, sizes, gradient, reach, threads);                                \
    }

EXPORT(float32, float)
EXPORT(float64, double)
