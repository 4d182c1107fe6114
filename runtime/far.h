/* FAR models without Python: a file that `export.py --to engine` wrote, images to logits.
 *
 *   far_model* model = far_open("model.far");
 *   if (far_error(model)) ...
 *   far_run(model, image, 1, logits, 2);
 *   far_close(model);
 *
 * Any number of threads may run one model at once. Texts are UTF-8 and live as long as the model.
 */
#ifndef FAR_H
#define FAR_H
#include <stdint.h>

#if defined(__GNUC__)
#define FAR_API __attribute__((visibility("default")))
#else
#define FAR_API
#endif
#ifdef __cplusplus
extern "C" {
#endif

typedef struct far_model far_model;

typedef struct {
  int64_t channels, height, width; /* of an image */
  int64_t classes;
  const char* const* names; /* of the classes; NULL where the file has none */
  const char* config;       /* JSON: the model's configuration, and under "data" how pictures are prepared */
} far_shape;

/* Reads a file. Ask far_error what came of it; close it whatever that says. */
FAR_API far_model* far_open(const char* path);

/* Why the model cannot be used; NULL where it can. A NULL model is one that memory did not suffice for. */
FAR_API const char* far_error(const far_model* model);

/* All zeros for a model that cannot be used. */
FAR_API far_shape far_describe(const far_model* model);

/* Images (batch, channels, height, width) to logits (batch, classes) on at most so many threads. Returns why not, or
 * NULL. */
FAR_API const char* far_run(const far_model* model, const float* images, int64_t batch, float* logits, int threads);

FAR_API void far_close(far_model* model);

#ifdef __cplusplus
}
#endif
#endif
