// Views of CT volumes. A thread takes rows of a view, whole, and of a row up to WIDE voxels at a time, eight by eight.
//
// Per row: the lattice is reduced to its n nodes along x, so that each voxel's displacement is one linear function of x
// per cell. Per eight voxels: positions, then four reads of two neighbouring taps each (along x, one unaligned word),
// converted and interpolated as vectors; where a tap of one of the eight may lie outside, voxel by voxel. Noise: eight
// Philox counters at a time give the numbers of 32 voxels. Nothing is stored but the row being made.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 8;
constexpr int64_t WIDE = 128;      // voxels of a row at a time; a multiple of 32
constexpr int64_t MOST_NODES = 64;  // as in table.py
constexpr int N_NUMBERS = 17;

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));

inline Floats load(const float* from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline Floats convert(Ints v) { return __builtin_convertvector(v, Floats); }

// ---- geometry

struct Geometry {
    const float* numbers;  // [views, N_NUMBERS]
    const float* lattice;  // [views, 3, nodes, nodes, nodes]
    int64_t nodes, views, z, y, x;
};

// Displacements of a row, as n values per component (x, y, z): the lattice interpolated along z and y.
struct RowNodes {
    float at[3][MOST_NODES];
};

inline void cell_of(int64_t voxel, int64_t side, int64_t nodes, int64_t& cell, float& fraction) {
    // In whole numbers, voxel (n - 1) / (side - 1) splits exactly.
    const int64_t last = side > 1 ? side - 1 : 1;
    cell = voxel * (nodes - 1) / last;
    if (cell > nodes - 2) cell = nodes - 2;
    fraction = static_cast<float>(voxel * (nodes - 1) - cell * last) / static_cast<float>(last);
}

void row_nodes(const Geometry& g, int64_t view, int64_t z, int64_t y, RowNodes& row) {
    const int64_t n = g.nodes;
    int64_t cz, cy;
    float fz, fy;
    cell_of(z, g.z, n, cz, fz);
    cell_of(y, g.y, n, cy, fy);
    for (int c = 0; c < 3; ++c) {
        const float* corner = g.lattice + (((view * 3 + c) * n + cz) * n + cy) * n;
        for (int64_t i = 0; i < n; ++i) {
            const float* p = corner + i;
            const float below = p[0] + fy * (p[n] - p[0]);
            const float above = p[n * n] + fy * (p[n * n + n] - p[n * n]);
            row.at[c][i] = below + fz * (above - below);
        }
    }
}

// Adds to values[0 .. count) the row's displacement of voxels begin .. begin + count along one component.
void add_displacement(const float* node, int64_t nodes, int64_t side, int64_t begin, int64_t count, float* values) {
    const int64_t last = side > 1 ? side - 1 : 1;
    const float inverse = 1.0f / static_cast<float>(last);
    for (int64_t cell = 0; cell < nodes - 1; ++cell) {
        // Voxels of this cell: cell <= x (n - 1) / last < cell + 1, and in the last one all that follow.
        int64_t from = (cell * last + nodes - 2) / (nodes - 1);
        int64_t to = cell == nodes - 2 ? side : ((cell + 1) * last + nodes - 2) / (nodes - 1);
        from = from > begin ? from : begin;
        to = to < begin + count ? to : begin + count;
        const float base = node[cell], slope = (node[cell + 1] - node[cell]) * inverse;
        for (int64_t x = from; x < to; ++x) {
            values[x - begin] += base + slope * static_cast<float>(static_cast<int32_t>(x * (nodes - 1) - cell * last));
        }
    }
}

// Positions of a row's voxels begin .. begin + count in the volume: place[0] along its x, [1] y, [2] z.
void positions(const Geometry& g, int64_t view, int64_t z, int64_t y, const RowNodes& row, int64_t begin, int64_t count,
               float place[3][WIDE]) {
    const float* a = g.numbers + view * N_NUMBERS;
    for (int c = 0; c < 3; ++c, a += 4) {
        const float base = static_cast<float>(static_cast<double>(a[1]) * y + static_cast<double>(a[2]) * z + a[3]);
        for (int64_t i = 0; i < count; ++i) {
            place[c][i] = base + a[0] * static_cast<float>(static_cast<int32_t>(begin + i));
        }
        if (g.nodes) add_displacement(row.at[c], g.nodes, g.x, begin, count, place[c]);
        // Lanes beyond the row's end are computed, and dropped.
        for (int64_t i = count; i % LANES; ++i) place[c][i] = place[c][count - 1];
    }
}

// ---- sampling

template <typename S>
struct Volume {
    const S* data;
    int64_t z, y, x;
};

template <typename S>
Volume<S> volume_of(const int64_t* source) {
    return {reinterpret_cast<const S*>(source[0]), source[1], source[2], source[3]};
}

inline float value(int16_t v) { return static_cast<float>(v); }
inline float value(uint8_t v) { return v != 0 ? 1.0f : 0.0f; }

// Two neighbours along x of eight rows, read as one word each.
inline void pair(const int16_t* data, Ints at, Floats& first, Floats& second) {
    int32_t words[LANES];
    for (int l = 0; l < LANES; ++l) std::memcpy(&words[l], data + at[l], 4);
    const Ints word = {words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]};
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    first = convert((word << 16) >> 16);
    second = convert(word >> 16);
#else
    second = convert((word << 16) >> 16);
    first = convert(word >> 16);
#endif
}

inline void pair(const uint8_t* data, Ints at, Floats& first, Floats& second) {
    for (int l = 0; l < LANES; ++l) {
        first[l] = value(data[at[l]]);
        second[l] = value(data[at[l] + 1]);
    }
}

// One position, with borders; the comparisons are false for NaN, which so lies outside.
template <typename S>
float sample_one(const Volume<S>& v, const float position[3], bool edge, float fill) {
    const int64_t sides[3] = {v.x, v.y, v.z};
    int64_t index[3][2];
    float fraction[3];
    for (int c = 0; c < 3; ++c) {
        const float first = edge ? 0.0f : -1.0f, last = static_cast<float>(edge ? sides[c] - 1 : sides[c]);
        float p = position[c] > first ? position[c] : first;
        p = p < last ? p : last;
        const float below = std::floor(p);
        fraction[c] = p - below;
        index[c][0] = static_cast<int64_t>(below);
        index[c][1] = index[c][0] + 1;
        if (edge && index[c][1] > sides[c] - 1) index[c][1] = sides[c] - 1;
    }
    float along_x[4];
    for (int k = 0; k < 4; ++k) {
        const int64_t y = index[1][k & 1], z = index[2][k >> 1];
        float tap[2];
        for (int i = 0; i < 2; ++i) {
            const int64_t x = index[0][i];
            const bool inside = x >= 0 && x < v.x && y >= 0 && y < v.y && z >= 0 && z < v.z;
            tap[i] = inside ? value(v.data[(z * v.y + y) * v.x + x]) : fill;
        }
        along_x[k] = tap[0] + fraction[0] * (tap[1] - tap[0]);
    }
    const float below = along_x[0] + fraction[1] * (along_x[1] - along_x[0]);
    const float above = along_x[2] + fraction[1] * (along_x[3] - along_x[2]);
    return below + fraction[2] * (above - below);
}

inline bool all(Ints condition) {
    Ints folded = condition;
    int32_t result = -1;
    for (int l = 0; l < LANES; ++l) result &= folded[l];
    return result == -1;
}

// Adds the samples at place + step to sums.
template <typename S>
void add_samples(const Volume<S>& v, const float place[3][WIDE], const float step[3], int64_t count, bool edge,
                 float fill, float* sums) {
    // Offsets in a vector are 32 bits wide; larger volumes are read voxel by voxel.
    const bool small = v.z * v.y * v.x < INT32_MAX;
    const float last_x = static_cast<float>(v.x - 1), last_y = static_cast<float>(v.y - 1),
                last_z = static_cast<float>(v.z - 1);
    const int32_t row = static_cast<int32_t>(small ? v.x : 0), plane = static_cast<int32_t>(small ? v.x * v.y : 0);
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats px = load(place[0] + i) + step[0], py = load(place[1] + i) + step[1],
                     pz = load(place[2] + i) + step[2];
        const Ints inside = (px >= 0.0f) & (px < last_x) & (py >= 0.0f) & (py < last_y) & (pz >= 0.0f) & (pz < last_z);
        if (!small || !all(inside)) {
            for (int l = 0; l < LANES && i + l < count; ++l) {
                const float position[3] = {px[l], py[l], pz[l]};
                sums[i + l] += sample_one(v, position, edge, fill);
            }
            continue;
        }
        // Not negative, so that to drop the fraction is to round down.
        const Ints x = __builtin_convertvector(px, Ints), y = __builtin_convertvector(py, Ints),
                   z = __builtin_convertvector(pz, Ints);
        const Floats fx = px - convert(x), fy = py - convert(y), fz = pz - convert(z);
        const Ints at = z * plane + y * row + x;
        Floats first, second, below, above, along_y[2];
        for (int k = 0; k < 2; ++k) {
            const Ints from = at + k * plane;
            pair(v.data, from, first, second);
            below = first + fx * (second - first);
            pair(v.data, from + row, first, second);
            above = first + fx * (second - first);
            along_y[k] = below + fy * (above - below);
        }
        store(sums + i, load(sums + i) + along_y[0] + fz * (along_y[1] - along_y[0]));
    }
}

// Means of the samples of each voxel of a row; `samples` are numbers of them along the view's (x, y, z).
template <typename S>
void averages(const Volume<S>& v, const float* numbers, const int32_t* samples, const float place[3][WIDE],
              int64_t count, bool edge, float fill, float* sums) {
    std::memset(sums, 0, WIDE * sizeof(float));
    for (int32_t k = 0; k < samples[0] * samples[1] * samples[2]; ++k) {
        const int32_t index[3] = {k % samples[0], k / samples[0] % samples[1], k / (samples[0] * samples[1])};
        float step[3] = {0.0f, 0.0f, 0.0f};
        for (int axis = 0; axis < 3; ++axis) {
            const float offset = (static_cast<float>(index[axis]) + 0.5f) / static_cast<float>(samples[axis]) - 0.5f;
            for (int c = 0; c < 3; ++c) step[c] += numbers[4 * c + axis] * offset;
        }
        add_samples(v, place, step, count, edge, fill, sums);
    }
    const float share = 1.0f / static_cast<float>(samples[0] * samples[1] * samples[2]);
    for (int64_t i = 0; i < WIDE; ++i) sums[i] *= share;
}

// ---- intensities

inline void multiply(uint32_t factor, Words word, Words& high, Words& low) {
    for (int l = 0; l < LANES; ++l) {
        const uint64_t product = static_cast<uint64_t>(factor) * word[l];
        high[l] = static_cast<uint32_t>(product >> 32);
        low[l] = static_cast<uint32_t>(product);
    }
}

// Philox4x32-10, as in philox.py, of eight counters.
inline void philox(Words counter[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        Words high_a, low_a, high_b, low_b;
        multiply(0xD2511F53u, counter[0], high_a, low_a);
        multiply(0xCD9E8D57u, counter[2], high_b, low_b);
        counter[0] = high_b ^ counter[1] ^ key0;
        counter[2] = high_a ^ counter[3] ^ key1;
        counter[1] = low_b;
        counter[3] = low_a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// ln x for positive normal x, within 2e-7: x = m 2^e with m near 1, and 2 atanh((m - 1) / (m + 1)) as a series, of
// which the first term left out is below 3e-9.
inline Floats logarithm(Floats x) {
    Ints bits;
    std::memcpy(&bits, &x, sizeof bits);
    // m lies between sqrt(1/2) and sqrt(2): the exponent is that of x / sqrt(1/2).
    const Ints exponent = (bits - 0x3f3504f3) >> 23;
    bits -= exponent << 23;
    Floats m;
    std::memcpy(&m, &bits, sizeof m);
    const Floats s = (m - 1.0f) / (m + 1.0f), q = s * s;
    const Floats series = 1.0f + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9))));
    // ln 2 in two parts, the first exact in products with whole numbers.
    const Floats e = convert(exponent);
    return e * 0.693145752f + (e * 1.42860677e-6f + 2.0f * s * series);
}

// exp(x) for x <= 0, within 2e-7: 2^n times the Taylor series on [-ln 2 / 2, ln 2 / 2]; below -87, exp(-87).
inline Floats exponential(Floats x) {
    x = x < -87.0f ? Floats{} - 87.0f : x;
    const float magic = 12582912.0f;  // 1.5 x 2^23: adding it rounds to a whole number
    const Floats n = (x * 1.44269504f + magic) - magic;
    Floats r = x - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    Floats p = 1.0f + r * (1.0f / 7);
    for (int k = 6; k > 0; --k) p = 1.0f + r * p * (1.0f / static_cast<float>(k));
    const Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// The formulas at the head of philox.py.
inline void box_muller(Words word0, Words word1, Floats& first, Floats& second) {
    const Floats u = 1.0f - convert(reinterpret_cast<Ints>(word0 >> 8)) * 0x1p-24f;
    const Floats v = convert(reinterpret_cast<Ints>(word1 >> 8)) * 0x1p-24f;
    Floats radius = -2.0f * logarithm(u);
    for (int l = 0; l < LANES; ++l) radius[l] = std::sqrt(radius[l]);
    // A quarter turn is taken off, exactly; the rest is at most pi / 4, where the series end below 3e-9.
    const Ints quarter = __builtin_convertvector(4.0f * v + 0.5f, Ints);
    const Floats angle = (v - convert(quarter) * 0.25f) * 6.28318531f, q = angle * angle;
    const Floats sine =
        angle * (1.0f + q * (-1.0f / 6 + q * (1.0f / 120 + q * (-1.0f / 5040 + q * (1.0f / 362880)))));
    const Floats cosine =
        1.0f + q * (-0.5f + q * (1.0f / 24 + q * (-1.0f / 720 + q * (1.0f / 40320 + q * (-1.0f / 3628800)))));
    const Ints odd = (quarter & 1) != 0;
    const Floats c = odd ? -sine : cosine, s = odd ? cosine : sine;
    const Floats sign = (quarter & 2) != 0 ? Floats{} - 1.0f : Floats{} + 1.0f;
    first = radius * sign * c;
    second = radius * sign * s;
}

// Normal numbers of a view's voxels 4 quarter, 4 quarter + 1, ..., at least `count` of them.
void normals(int64_t seed, int64_t quarter, int64_t count, float* to) {
    const uint64_t key = static_cast<uint64_t>(seed);
    for (int64_t i = 0; i < count; i += 4 * LANES, quarter += LANES) {
        Words counter[4] = {};
        for (int l = 0; l < LANES; ++l) {
            counter[0][l] = static_cast<uint32_t>(quarter + l);
            counter[1][l] = static_cast<uint32_t>(static_cast<uint64_t>(quarter + l) >> 32);
        }
        philox(counter, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
        Floats normal[4];
        box_muller(counter[0], counter[1], normal[0], normal[1]);
        box_muller(counter[2], counter[3], normal[2], normal[3]);
        for (int l = 0; l < LANES; ++l) {
            for (int k = 0; k < 4; ++k) to[i + 4 * l + k] = normal[k][l];
        }
    }
}

// HU to network input, in place: noise, shift, window, gamma.
void intensities(const float* numbers, int64_t seed, int64_t first_voxel, int64_t count, float* hu) {
    const float low = numbers[12], shift = numbers[14], gamma = numbers[15], noise_hu = numbers[16];
    const float inverse = 1.0f / (numbers[13] - low);
    if (noise_hu > 0.0f) {
        float noise[WIDE + 4 + 4 * LANES];
        normals(seed, first_voxel / 4, first_voxel % 4 + count, noise);
        for (int64_t i = 0; i < count; ++i) hu[i] += noise_hu * noise[first_voxel % 4 + i];
    }
    for (int64_t i = 0; i < count; i += LANES) {
        Floats v = (load(hu + i) + shift - low) * inverse;
        v = v > 0.0f ? v : Floats{};
        v = v < 1.0f ? v : Floats{} + 1.0f;
        if (gamma != 1.0f) {
            // Where the logarithm has no value, 0 ^ gamma is 0.
            const Ints positive = v > 1e-37f;
            const Floats power = exponential(gamma * logarithm(positive ? v : Floats{} + 1.0f));
            v = positive ? power : Floats{};
        }
        store(hu + i, v);
    }
}

// ---- output

inline void write(float* to, const float* values, int64_t count) { std::memcpy(to, values, count * sizeof(float)); }

inline void write(uint16_t* to, const float* values, int64_t count) {  // bfloat16, rounded to even; values are in [0, 1]
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        to[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

// Where the voxels of a row go: into patches, or, with the patch as large as the view, into a volume.
struct Layout {
    int64_t pz, py, px;
};

template <typename T>
void write_row(const Geometry& g, const Layout& p, int64_t view, int64_t z, int64_t y, int64_t begin, int64_t count,
               const float* values, T* out) {
    const int64_t patch = p.pz * p.py * p.px;
    const int64_t row_of_patches = ((view * (g.z / p.pz) + z / p.pz) * (g.y / p.py) + y / p.py) * (g.x / p.px);
    const int64_t row_in_patch = (z % p.pz * p.py + y % p.py) * p.px;
    for (int64_t x = begin; x < begin + count;) {
        const int64_t left = p.px - x % p.px, run = left < begin + count - x ? left : begin + count - x;
        write(out + (row_of_patches + x / p.px) * patch + row_in_patch + x % p.px, values + (x - begin), run);
        x += run;
    }
}

// Calls row(view, z, y, nodes) for all rows of all views.
template <typename Row>
void each_row(const Geometry& g, int threads, Row row) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t i = 0; i < g.views * g.z * g.y; ++i) {
        const int64_t view = i / (g.z * g.y), z = i / g.y % g.z, y = i % g.y;
        RowNodes nodes;
        if (g.nodes) row_nodes(g, view, z, y, nodes);
        row(view, z, y, nodes);
    }
}

template <typename T>
void make_views(const int64_t* sources, const Geometry& g, const int32_t* samples, const int64_t* seeds, Layout layout,
                bool edge, float fill, T* out, int threads) {
    each_row(g, threads, [&](int64_t view, int64_t z, int64_t y, const RowNodes& nodes) {
        const Volume<int16_t> volume = volume_of<int16_t>(sources + 4 * view);
        const float* numbers = g.numbers + view * N_NUMBERS;
        float place[3][WIDE], hu[WIDE];
        for (int64_t begin = 0; begin < g.x; begin += WIDE) {
            const int64_t count = g.x - begin < WIDE ? g.x - begin : WIDE;
            positions(g, view, z, y, nodes, begin, count, place);
            averages(volume, numbers, samples + 3 * view, place, count, edge, fill, hu);
            intensities(numbers, seeds[view], (z * g.y + y) * g.x + begin, count, hu);
            write_row(g, layout, view, z, y, begin, count, hu, out);
        }
    });
}

// The voxel nearest to a position, or 0 outside.
uint8_t nearest(const Volume<uint8_t>& v, float px, float py, float pz) {
    const float x = std::floor(px + 0.5f), y = std::floor(py + 0.5f), z = std::floor(pz + 0.5f);
    const bool inside = x >= 0.0f && x < static_cast<float>(v.x) && y >= 0.0f && y < static_cast<float>(v.y) &&
                        z >= 0.0f && z < static_cast<float>(v.z);
    if (!inside) return 0;
    return v.data[(static_cast<int64_t>(z) * v.y + static_cast<int64_t>(y)) * v.x + static_cast<int64_t>(x)];
}

}  // namespace

extern "C" {

// The four words of one Philox counter, for tests.
void philox_words(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
    Words words[4];
    for (int k = 0; k < 4; ++k) words[k] = Words{} + counter[k];
    philox(words, key[0], key[1]);
    for (int k = 0; k < 4; ++k) out[k] = words[k][LANES - 1];
}

void ct_views(const int64_t* sources, const float* numbers, const float* lattice, int64_t nodes, int64_t views,
              int64_t z, int64_t y, int64_t x, const int32_t* samples, const int64_t* seeds, int64_t pz, int64_t py,
              int64_t px, int edge, float fill, int bfloat16, void* out, int threads) {
    const Geometry g = {numbers, lattice, nodes, views, z, y, x};
    const Layout layout = {pz, py, px};
    if (bfloat16) {
        make_views(sources, g, samples, seeds, layout, edge != 0, fill, static_cast<uint16_t*>(out), threads);
    } else {
        make_views(sources, g, samples, seeds, layout, edge != 0, fill, static_cast<float*>(out), threads);
    }
}

void mask_views(const int64_t* sources, const float* numbers, const float* lattice, int64_t nodes, int64_t views,
                int64_t z, int64_t y, int64_t x, const int32_t* samples, int wholly, uint8_t* out, int threads) {
    const Geometry g = {numbers, lattice, nodes, views, z, y, x};
    each_row(g, threads, [&](int64_t view, int64_t vz, int64_t vy, const RowNodes& row) {
        const Volume<uint8_t> volume = volume_of<uint8_t>(sources + 4 * view);
        float place[3][WIDE], share[WIDE];
        for (int64_t begin = 0; begin < g.x; begin += WIDE) {
            const int64_t count = g.x - begin < WIDE ? g.x - begin : WIDE;
            uint8_t* to = out + ((view * g.z + vz) * g.y + vy) * g.x + begin;
            positions(g, view, vz, vy, row, begin, count, place);
            if (wholly) {
                averages(volume, g.numbers + view * N_NUMBERS, samples + 3 * view, place, count, false, 0.0f, share);
                for (int64_t i = 0; i < count; ++i) to[i] = share[i] > 0.999f;
            } else {
                for (int64_t i = 0; i < count; ++i) to[i] = nearest(volume, place[0][i], place[1][i], place[2][i]);
            }
        }
    });
}

// Positions mapped by to_mm[view] (3 x 4): out is [views, 3, z, y, x].
void view_coords(const float* numbers, const float* lattice, int64_t nodes, int64_t views, int64_t z, int64_t y,
                 int64_t x, const float* to_mm, float* out, int threads) {
    const Geometry g = {numbers, lattice, nodes, views, z, y, x};
    each_row(g, threads, [&](int64_t view, int64_t vz, int64_t vy, const RowNodes& row) {
        float place[3][WIDE];
        for (int64_t begin = 0; begin < g.x; begin += WIDE) {
            const int64_t count = g.x - begin < WIDE ? g.x - begin : WIDE;
            positions(g, view, vz, vy, row, begin, count, place);
            for (int c = 0; c < 3; ++c) {
                const float* m = to_mm + (view * 3 + c) * 4;
                float* to = out + (((view * 3 + c) * g.z + vz) * g.y + vy) * g.x + begin;
                for (int64_t i = 0; i < count; ++i) {
                    to[i] = m[0] * place[0][i] + m[1] * place[1][i] + m[2] * place[2][i] + m[3];
                }
            }
        }
    });
}
}
