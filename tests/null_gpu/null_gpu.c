// A GPU that computes nothing: CUDA's runtime and driver and cuBLAS (NCCL: nccl.c), as far as PyTorch and Triton call
// them in a training step. Kernels are not run, memory is the host's and never touched beyond small copies, so a model
// of any size fits. What is left of a step is what the host does for it, and what memory PyTorch would ask for. Under
// NULL_GPU_COMPUTES all copies are made, for computed.py.
//
// Functions with nothing to return are not here: build.py makes them up. Loaded before CUDA's own libraries; built once
// more with -DDRIVER as libcuda.so.1, which Triton opens by name.
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MULTIPROCESSORS 132 // of an H200, as all that follows
#define MEMORY (139UL << 30)
#define SMALL (1UL << 20)
#define RETURN(place, value) return *(place) = (value), 0

static int attribute(int which) {
  switch (which) {
  case cudaDevAttrMultiProcessorCount: return MULTIPROCESSORS;
  case cudaDevAttrComputeCapabilityMajor: return 9;
  case cudaDevAttrMaxThreadsPerBlock: return 1024;
  case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 227 << 10;
  case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 228 << 10;
  case cudaDevAttrWarpSize: return 32;
  case cudaDevAttrMaxRegistersPerBlock:
  case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
  case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
  case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
  case cudaDevAttrL2CacheSize: return 50 << 20;
  case cudaDevAttrClockRate: return 1980000;
  case cudaDevAttrMemoryClockRate: return 3201000;
  case cudaDevAttrGlobalMemoryBusWidth: return 6144;
  case cudaDevAttrMaxGridDimX: return 2147483647;
  case cudaDevAttrMaxGridDimY:
  case cudaDevAttrMaxGridDimZ: return 65535;
  case cudaDevAttrMaxBlockDimX:
  case cudaDevAttrMaxBlockDimY: return 1024;
  case cudaDevAttrMaxBlockDimZ: return 64;
  case cudaDevAttrUnifiedAddressing:
  case cudaDevAttrCooperativeLaunch: return 1;
  default: return 0;
  }
}

#ifdef DRIVER // ------------------------------------------------------------------------------------- the driver's API

long null_gpu_launches __attribute__((weak));

int cuDriverGetVersion(int *version) { RETURN(version, 13000); }
int cuDeviceGet(int *device, int index) { RETURN(device, 0); }
int cuDeviceGetCount(int *count) { RETURN(count, 1); }
int cuDeviceGetAttribute(int *value, int which, int device) { RETURN(value, attribute(which)); }
int cuCtxGetCurrent(void **context) { RETURN(context, (void *)16); }
int cuCtxGetDevice(int *device) { RETURN(device, 0); }
int cuDevicePrimaryCtxRetain(void **context, int device) { RETURN(context, (void *)16); }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; RETURN(active, 1); }
int cuGetErrorString(int error, const char **text) { RETURN(text, "null GPU"); }
int cuModuleLoadData(void **module, const void *image) { RETURN(module, (void *)32); }
int cuModuleGetFunction(void **function, void *module, const char *name) { RETURN(function, (void *)48); }
int cuFuncGetAttribute(int *value, int which, void *function) { RETURN(value, which == 0 ? 1024 : which == 4 ? 64 : 0); }
int cuLaunchKernel() { return null_gpu_launches++, 0; }
int cuLaunchKernelEx() { return null_gpu_launches++, 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count) { RETURN(count, 2); }
int cuOccupancyMaxActiveClusters(int *count) { RETURN(count, 16); }
int cuPointerGetAttribute(void *value, int which, uint64_t pointer) {
  if (which == 3) *(uint64_t *)value = pointer; // CU_POINTER_ATTRIBUTE_DEVICE_POINTER
  return 0;
}

#else // ------------------------------------------------------------------------------------------ the runtime and cuBLAS

long null_gpu_launches, null_gpu_products;
long null_gpu_waits;    // of the host for the GPU
long null_gpu_pageable; // copies to the GPU from memory that is not pinned: beyond 64 KiB a real one makes the host wait

static __thread int current; // device of this thread
static struct { char *start; size_t size; int device; } blocks[1 << 16], pinned[1 << 12];
static int num_blocks, num_pinned;
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int block_of(const void *pointer) {
  for (int i = 0; i < num_blocks; i++)
    if ((char *)pointer >= blocks[i].start && (char *)pointer < blocks[i].start + blocks[i].size) return i;
  return -1;
}

cudaError_t cudaMalloc(void **pointer, size_t size) {
  pthread_mutex_lock(&lock);
  void *start = MAP_FAILED;
  if (size && used + size <= MEMORY && num_blocks < 1 << 16)
    start = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start != MAP_FAILED) {
    blocks[num_blocks].start = start, blocks[num_blocks].device = current, blocks[num_blocks++].size = size;
    used += size, *pointer = start;
  }
  pthread_mutex_unlock(&lock);
  return start == MAP_FAILED ? cudaErrorMemoryAllocation : 0;
}

cudaError_t cudaFree(void *pointer) {
  pthread_mutex_lock(&lock);
  int i = pointer ? block_of(pointer) : -1;
  if (i >= 0) {
    munmap(blocks[i].start, blocks[i].size);
    used -= blocks[i].size, blocks[i] = blocks[--num_blocks];
  }
  pthread_mutex_unlock(&lock);
  return 0;
}

cudaError_t cudaMemGetInfo(size_t *left, size_t *all) { *left = MEMORY - used; RETURN(all, MEMORY); }

static int is_pinned(const void *pointer) { // freed ones stay listed: PyTorch keeps what it pins
  for (int i = 0; i < num_pinned; i++)
    if ((char *)pointer >= pinned[i].start && (char *)pointer < pinned[i].start + pinned[i].size) return 1;
  return 0;
}

cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
  *p = aligned_alloc(4096, (size + 4095) & ~4095UL);
  pthread_mutex_lock(&lock);
  if (num_pinned < 1 << 12) pinned[num_pinned].start = *p, pinned[num_pinned++].size = size;
  pthread_mutex_unlock(&lock);
  return 0;
}
cudaError_t cudaFreeHost(void *pointer) { return free(pointer), 0; }

static int is_made(size_t size) { return size <= SMALL || getenv("NULL_GPU_COMPUTES"); }

static int copy(void *to, const void *from, size_t size) {
  if (is_made(size)) memcpy(to, from, size);
  else if (block_of(to) < 0) memset(to, 0, size);
  return 0;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  return null_gpu_waits++, copy(to, from, size);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  null_gpu_pageable += block_of(to) >= 0 && block_of(from) < 0 && !is_pinned(from);
  return copy(to, from, size);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return null_gpu_waits++, 0; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return null_gpu_waits++, 0; }
cudaError_t cudaDeviceSynchronize() { return null_gpu_waits++, 0; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  if (is_made(size)) memset(to, value, size);
  return null_gpu_launches++, 0;
}
cudaError_t cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, 0); }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *pointer) {
  memset(out, 0, sizeof *out);
  int block = block_of(pointer), device = block >= 0;
  out->device = device ? blocks[block].device : 0;
  out->type = device ? cudaMemoryTypeDevice : is_pinned(pointer) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  *(device ? &out->devicePointer : &out->hostPointer) = (void *)pointer;
  return 0;
}

cudaError_t cudaGetDevice(int *device) { RETURN(device, current); }
cudaError_t cudaSetDevice(int device) { return current = device, 0; }
cudaError_t cudaGetDeviceCount(int *count) {
  const char *given = getenv("NULL_GPUS");
  RETURN(count, given ? atoi(given) : 1);
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) { RETURN(value, attribute(which)); }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
  memset(out, 0, sizeof *out);
  strcpy(out->name, "null GPU");
  out->totalGlobalMem = MEMORY;
  out->major = 9;
  out->multiProcessorCount = MULTIPROCESSORS;
  out->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  out->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  out->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->warpSize = 32;
  out->maxThreadsPerBlock = out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxThreadsPerMultiProcessor = 2048;
  out->maxBlocksPerMultiProcessor = 32;
  out->l2CacheSize = 50 << 20;
  out->maxGridSize[0] = 2147483647;
  out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->unifiedAddressing = out->cooperativeLaunch = 1;
  out->textureAlignment = 512;
  return 0;
}
cudaError_t cudaDriverGetVersion(int *version) { RETURN(version, 13000); }
cudaError_t cudaRuntimeGetVersion(int *version) { RETURN(version, 13000); }
cudaError_t cudaDeviceCanAccessPeer(int *can, int one, int other) { RETURN(can, 0); }
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) { return strncpy(text, "0000:00:00.0", size), 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) {
  if (least) *least = 0;
  if (most) *most = -5;
  return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *function) {
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024, out->binaryVersion = out->ptxVersion = 90, out->numRegs = 64;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *f, int b, size_t s) { RETURN(count, 2); }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned flags) {
  RETURN(n, 2);
}
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) { static char place[1 << 16]; RETURN(address, place); }
const char *cudaGetErrorString(cudaError_t error) { return "error of the null GPU"; }
const char *cudaGetErrorName(cudaError_t error) { return "nullGpuError"; }
static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
  if (found) *found = 0;
  RETURN(function, (void *)nothing);
}

static uintptr_t handles = 4096; // of streams and events
static void *handle(void) { return (void *)__sync_add_and_fetch(&handles, 16); }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { RETURN(stream, handle()); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { RETURN(stream, handle()); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { RETURN(priority, 0); }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { RETURN(status, 0); }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  RETURN(status, 0);
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { RETURN(event, handle()); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { RETURN(event, handle()); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) { RETURN(ms, 1); }

cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) { return null_gpu_launches++, 0; }
cudaError_t __cudaLaunchKernel(void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) { return null_gpu_launches++, 0; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return null_gpu_launches++, 0; }
cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) {
  return null_gpu_launches++, 0;
}
cudaError_t __cudaGetKernel(void **kernel, const void *function) { RETURN(kernel, (void *)function); }
void **__cudaRegisterFatBinary(void *binary) { static void *place[4]; return place; }
char __cudaInitModule(void **module) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  grid->x = grid->y = grid->z = block->x = block->y = block->z = 1;
  *(void **)stream = 0;
  RETURN(shared, 0);
}

int cublasCreate_v2(void **cublas) { RETURN(cublas, calloc(1, 4096)); }
int cublasGetMathMode(void *cublas, int *mode) { RETURN(mode, 0); }
int cublasGetPointerMode_v2(void *cublas, int *mode) { RETURN(mode, 0); }
int cublasSgemm_v2() { return null_gpu_products++, 0; }
int cublasGemmEx() { return null_gpu_products++, 0; }
int cublasGemmStridedBatchedEx() { return null_gpu_products++, 0; }
int cublasLtMatmul() { return null_gpu_products++, 0; }
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { RETURN(made, calloc(1, 256)); }
int cublasLtMatmulPreferenceCreate(void **made) { RETURN(made, calloc(1, 256)); }
int cublasLtMatrixLayoutCreate(void **made, int type, uint64_t rows, uint64_t columns, int64_t ld) { RETURN(made, calloc(1, 256)); }
int cublasLtMatmulDescDestroy(void *made) { return free(made), 0; }
int cublasLtMatmulPreferenceDestroy(void *made) { return free(made), 0; }
int cublasLtMatrixLayoutDestroy(void *made) { return free(made), 0; }
typedef struct { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; } Heuristic;
int cublasLtMatmulAlgoGetHeuristic(void *lt, void *d, void *a, void *b, void *c, void *e, void *preference, int asked,
                                   Heuristic *results, int *found) {
  memset(results, 0, sizeof *results);
  RETURN(found, 1);
}
#endif
