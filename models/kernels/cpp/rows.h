// What is done to a row between products: LayerNorm, and the pixels of a patch laid out as one.
#pragma once
#include <cmath>
#include <cstring>

#include "product.h"

namespace {

inline float sum(vf x) {
  float parts[V];
  store(parts, x);
  for (int half = V / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

// Lanes at or behind `left` set to zero.
inline vf first_lanes(vf x, int64_t left) {
  vi lane;
  for (int i = 0; i < V; ++i) lane[i] = i;
  return lane < (int)std::min<int64_t>(left, V) ? x : vf{};
}

// LayerNorm of rows of `dim` floats, padded with zeros, in and out. w: weight and bias, padded, then epsilon.
template <class Y>
void norm_rows(const float* x, int64_t ldx, int64_t rows, int64_t dim, const float* w, Y* out, int64_t ldo) {
  const int64_t width = padded(dim), whole = dim / V * V;
  const float *bias = w + width, eps = bias[width];
  for (int64_t r = 0; r < rows; ++r, x += ldx, out += ldo) {
    vf total{}, squares{};
    for (int64_t j = 0; j < width; j += V) total += load(x + j);
    const float mean = sum(total) / dim;
    for (int64_t j = 0; j < whole; j += V) squares += (load(x + j) - mean) * (load(x + j) - mean);
    if (whole < dim) {
      const vf rest = first_lanes(load(x + whole) - mean, dim - whole);
      squares += rest * rest;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
    for (int64_t j = 0; j < width; j += V) store(out + j, (load(x + j) - mean) * scale * load(w + j) + load(bias + j));
  }
}

// Rows of `width` floats in 8 bits: in steps of the row's largest magnitude / STEPS, which is its scale; that of a row
// with a NaN or an infinity is NaN. What lies behind their `own` numbers counts as zeros.
inline void quantize_rows(const float* x, int64_t ldx, int64_t rows, int64_t width, q8* out, int64_t ldo, float* scales,
                          int64_t own = INT64_MAX) {
  for (int64_t r = 0; r < rows; ++r, x += ldx, out += ldo) {
    vi most{};  // as integers magnitudes are in the same order, infinities and then NaNs behind them
    for (int64_t j = 0; j < width; j += V) {
      const vi bits = (vi)first_lanes(load(x + j), own - j) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    int32_t top = 0;
    for (int i = 0; i < V; ++i) top = std::max(top, most[i]);
    float largest;
    std::memcpy(&largest, &top, sizeof largest);
    scales[r] = largest / STEPS + (largest - largest);
    const float steps = largest > 0 ? STEPS / largest : 0;
    for (int64_t j = 0; j < width; j += V) store(out + j, first_lanes(load(x + j), own - j) * steps);
  }
}

struct Images {
  const float* data;
  int64_t batch, image, channel, row, column;  // strides in floats
};

// The pixels of one patch as the embedding reads them, channel by channel, row by row. `line` is scratch.
template <class X>
void patch_row(const Images& from, const float* corner, int64_t channels, int64_t height, int64_t width, float* line,
               X* out) {
  const int64_t pixels = channels * height * width;
  float* to = line;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t y = 0; y < height; ++y, to += width) {
      const float* at = corner + c * from.channel + y * from.row;
      for (int64_t i = 0; i < width; ++i) to[i] = at[i * from.column];
    }
  for (int64_t k = pixels; k < padded(pixels); ++k) line[k] = 0.0f;
  for (int64_t k = 0; k < padded(pixels); k += V) store(out + k, load(line + k));
}

}  // namespace
