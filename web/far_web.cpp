// What the page calls: runtime/far.h without 64-bit numbers and structures, and pictures prepared as far-run does.
#include "../runtime/far.h"
#include "../runtime/picture.h"

#define EXPORTED extern "C" __attribute__((used, visibility("default")))

// Of its square images in three channels; 0 where a model reads others.
EXPORTED int web_side(const far_model* model) {
  const far_shape shape = far_describe(model);
  return shape.channels == 3 && shape.height == shape.width ? int(shape.height) : 0;
}
EXPORTED int web_classes(const far_model* model) { return int(far_describe(model).classes); }
EXPORTED const char* web_config(const far_model* model) { return far_describe(model).config; }

// Rows of RGB bytes to an image as the model reads it. Returns why not, or null.
EXPORTED const char* web_prepare(const far_model* model, const unsigned char* rgb, int width, int height,
                                 float* image) {
  try {
    const far_shape shape = far_describe(model);
    const far_picture::Picture picture{width, height, {rgb, rgb + size_t(3) * width * height}};
    const std::vector<float> made = far_picture::prepare(picture, {shape.config, shape.height});
    std::copy(made.begin(), made.end(), image);
  } catch (const std::exception&) { return "the picture cannot be prepared: too large, or the model does not say how"; }
  return nullptr;
}

EXPORTED const char* web_run(const far_model* model, const float* images, int batch, float* logits, int threads) {
  return far_run(model, images, batch, logits, threads);
}
