// A picture file to what a model reads, as datasets/images.py and utils/preprocessing.py prepare PNG, JPEG and BMP:
// turned upright, resized as Pillow does it, the middle cut out, each channel less its mean and over its deviation.
#pragma once
#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "json.h"

#if __has_include(<stb_image.h>)
#define FAR_PICTURES 1
#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_PNG  // other decoders of older versions read outside their memory on damaged files
#define STBI_ONLY_JPEG
#define STBI_ONLY_BMP
#include <stb_image.h>
#endif

namespace far_picture {

struct Preparation {
  float mean[3], deviation[3];
  double crop;  // share of the resized side that is kept
  bool squash, cubic;
  int side;

  // From a model's configuration. Throws std::runtime_error where it does not say.
  Preparation(const std::string& config, int64_t side) : side(int(side)) {
    const far_json::Value whole = far_json::Reader(config).read();
    const far_json::Value& data = whole["data"];
    const auto &means = data["mean"].list, &deviations = data["std"].list;
    crop = data["crop_pct"].number;
    if (means.size() != 3 || deviations.size() != 3 || !(crop >= 0.1 && crop <= 1))
      throw std::runtime_error("its configuration does not say how pictures are prepared");
    for (int c = 0; c < 3; ++c) mean[c] = float(means[c].number), deviation[c] = float(deviations[c].number);
    squash = data["crop_mode"].text == "squash";
    cubic = data["interpolation"].text != "bilinear";
  }
};

constexpr int64_t MOST_PIXELS = 89478485;  // as Pillow's, against files that unfold to gigabytes

// Rows of 8-bit RGB.
struct Picture {
  int width, height;
  std::vector<unsigned char> pixels;
};

// The orientation in a JPEG's EXIF, 1 to 8; 1 where there is none. See EXIF 2.3, 4.5.4: markers, then TIFF.
inline int orientation(const std::vector<unsigned char>& file) {
  const auto at = [&](size_t i) { return i < file.size() ? unsigned(file[i]) : 0u; };
  if (at(0) != 0xff || at(1) != 0xd8) return 1;
  for (size_t i = 2; at(i) == 0xff && at(i + 1) != 0xda; i += 2 + 256 * at(i + 2) + at(i + 3)) {
    constexpr char EXIF[] = "Exif\0";
    if (at(i + 1) != 0xe1 || i + 18 > file.size() || !std::equal(EXIF, EXIF + 6, file.begin() + i + 4)) continue;
    const size_t start = i + 10;
    const bool little = at(start) == 'I';
    const auto number = [&](size_t where, int bytes) {
      size_t value = 0;
      for (int b = 0; b < bytes; ++b) value |= size_t(at(start + where + b)) << 8 * (little ? b : bytes - 1 - b);
      return value;
    };
    const size_t table = number(4, 4), entries = number(table, 2);
    for (size_t e = 0; e < entries; ++e)
      if (const size_t entry = table + 2 + 12 * e; number(entry, 2) == 0x112) {
        const size_t value = number(entry + 8, 2);
        return value >= 1 && value <= 8 ? int(value) : 1;
      }
  }
  return 1;
}

inline Picture upright(const Picture& from, int orientation) {
  if (orientation == 1) return from;
  const bool swapped = orientation >= 5, flip_x = (0b110001100 >> orientation) & 1,
             flip_y = (0b011011000 >> orientation) & 1;
  Picture to{swapped ? from.height : from.width, swapped ? from.width : from.height, {}};
  to.pixels.resize(from.pixels.size());
  for (int y = 0; y < to.height; ++y)
    for (int x = 0; x < to.width; ++x) {
      const int u = swapped ? y : x, v = swapped ? x : y;
      const size_t row = flip_y ? from.height - 1 - v : v, column = flip_x ? from.width - 1 - u : u;
      std::copy_n(&from.pixels[3 * (row * from.width + column)], 3, &to.pixels[3 * (size_t(y) * to.width + x)]);
    }
  return to;
}

inline Picture cut(const Picture& from, int left, int top, int width, int height) {
  Picture to{width, height, std::vector<unsigned char>(size_t(3) * width * height)};
  for (int y = 0; y < height; ++y)
    std::copy_n(&from.pixels[3 * (size_t(top + y) * from.width + left)], 3 * width, &to.pixels[size_t(3) * y * width]);
  return to;
}

// A side at a time, bit for bit as Pillow does it: filters spread where a picture shrinks, what would lie beyond the
// border has no weight, weights are integers of 22 bits. Catmull and Rom's cubic with a = -1/2, or a triangle.
inline Picture resize_side(const Picture& from, int size, bool across, bool cubic) {
  constexpr int BITS = 22;
  const int old = across ? from.width : from.height;
  if (old == size) return from;
  const auto filter = [&](double x) {
    constexpr double A = -0.5;
    x = std::abs(x);
    if (!cubic) return x < 1 ? 1 - x : 0.0;
    return x < 1 ? ((A + 2) * x - (A + 3)) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * A : 0.0;
  };
  Picture to{across ? size : from.width, across ? from.height : size, {}};
  if (int64_t(to.width) * to.height > MOST_PIXELS) throw std::runtime_error("too long and too thin");
  to.pixels.resize(size_t(3) * to.width * to.height);
  const double scale = double(old) / size, spread = std::max(1.0, scale), reach = spread * (cubic ? 2 : 1);
  const size_t step = across ? 3 : size_t(3) * from.width, lines = across ? from.height : from.width;
  std::vector<double> shares;
  std::vector<int> weights;
  for (int i = 0; i < size; ++i) {
    const double center = (i + 0.5) * scale;
    const int low = std::max(0, int(center - reach + 0.5)), high = std::min(old, int(center + reach + 0.5));
    shares.clear(), weights.clear();
    double sum = 0;
    for (int j = low; j < high; ++j) sum += shares.emplace_back(filter((j - center + 0.5) * (1 / spread)));
    for (const double share : shares) weights.push_back(int(std::round(share * (1 / sum) * (1 << BITS))));
    for (size_t line = 0; line < lines; ++line) {
      const unsigned char* source = &from.pixels[(across ? line * 3 * from.width : 3 * line) + low * step];
      unsigned char* target = &to.pixels[3 * (across ? line * size + i : size_t(i) * to.width + line)];
      for (int c = 0; c < 3; ++c) {
        int total = 1 << (BITS - 1);
        for (size_t j = 0; j < weights.size(); ++j) total += weights[j] * source[j * step + c];
        target[c] = (unsigned char)std::clamp(total >> BITS, 0, 255);
      }
    }
  }
  return to;
}

inline Picture resize(const Picture& from, int width, int height, bool cubic) {
  return resize_side(resize_side(from, width, true, cubic), height, false, cubic);
}

// All bytes of a file. Throws std::runtime_error where there is none, or too many.
inline std::vector<unsigned char> read_file(const char* path) {
  struct stat status;
  if (stat(path, &status) || !S_ISREG(status.st_mode)) throw std::runtime_error("no such file");  // nor a pipe
  if (status.st_size > 1 << 30) throw std::runtime_error("more than a gigabyte");
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

#if FAR_PICTURES
inline Picture read(const char* path) {
  const auto refuse = [](const std::string& why) { throw std::runtime_error("not a readable picture (" + why + ")"); };
  int width, height, channels;
  const std::vector<unsigned char> file = read_file(path);
  if (!stbi_info_from_memory(file.data(), int(file.size()), &width, &height, &channels)) refuse(stbi_failure_reason());
  if (int64_t(width) * height > MOST_PIXELS) refuse("more than " + std::to_string(MOST_PIXELS) + " pixels");
  const std::unique_ptr<unsigned char, void (*)(void*)> pixels(
      stbi_load_from_memory(file.data(), int(file.size()), &width, &height, &channels, 3), stbi_image_free);
  if (!pixels) refuse(stbi_failure_reason());
  return upright({width, height, {pixels.get(), pixels.get() + size_t(3) * width * height}}, orientation(file));
}

#else
inline Picture read(const char*) {
  throw std::runtime_error("this far-run was built without stb_image; give it .f32 files");
}
#endif

// What the model reads, channel by channel. Throws std::runtime_error, std::bad_alloc.
inline std::vector<float> prepare(Picture picture, const Preparation& how) {
  constexpr int STRIP = 8;  // of a picture longer than so many times its width the middle is seen
  const int side = int(std::floor(how.side / how.crop));
  if (how.squash) {
    picture = resize(picture, side, side, how.cubic);
  } else {
    const int most = STRIP * std::min(picture.width, picture.height);
    const int wide = std::min(picture.width, most), high = std::min(picture.height, most);
    picture = cut(picture, (picture.width - wide) / 2, (picture.height - high) / 2, wide, high);
    const bool tall = high > wide;
    const int longer = int(int64_t(side) * std::max(wide, high) / std::min(wide, high));
    picture = resize(picture, tall ? side : longer, tall ? longer : side, how.cubic);
  }
  const auto middle = [&](int length) { return int(std::nearbyint((length - how.side) / 2.0)); };
  picture = cut(picture, middle(picture.width), middle(picture.height), how.side, how.side);
  std::vector<float> out(size_t(3) * how.side * how.side);
  for (int c = 0; c < 3; ++c)
    for (size_t i = 0; i < out.size() / 3; ++i)
      out[c * (out.size() / 3) + i] = (picture.pixels[3 * i + c] / 255.0f - how.mean[c]) / how.deviation[c];
  return out;
}

}  // namespace far_picture
