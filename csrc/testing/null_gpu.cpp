// A GPU that computes nothing, for machines without one: PyTorch's CUDA build runs on it as on a GPU, so that what the
// host does can be tried and counted: allocations, copies, launches, waiting, recording. Numbers are what happens to be
// in memory. bench/null_gpu.py builds it as libcuda.so.1 and has it loaded before all else: it then takes the place of
// the driver, the runtime and cuBLAS. Functions that are missing here fail, as the real ones find no GPU.
//
// Memory is address space of the host's, which nobody touches beyond small copies. While a thread records a graph, what
// CUDA forbids then fails as it does there, and is told.
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

namespace {

constexpr size_t kPage = 2 << 20, kTouched = 64 << 10;  // larger copies are not made
constexpr int kOutOfMemory = 2, kNotSupported = 801;

std::mutex mutex;
std::map<uintptr_t, size_t> device_memory, pinned_memory;  // start -> bytes
std::set<cudaStream_t> recording;
size_t used = 0;
std::atomic<long> launches{0}, waits{0}, replays{0};
thread_local cudaError_t last_error = cudaSuccess;
thread_local bool records = false;  // this thread, in a mode that forbids what is not recorded
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

struct Event {
  double milliseconds = 0;
  bool is_recorded = false;
};

size_t capacity() {
  const char* mebibytes = getenv("NULL_GPU_MIB");
  return static_cast<size_t>(mebibytes ? atoll(mebibytes) : 143771) << 20;  // an H200's
}

cudaError_t fail(cudaError_t error, const char* what = nullptr) {
  if (what) fprintf(stderr, "null GPU: %s while a step is recorded\n", what);
  return last_error = error;
}

bool is_forbidden() { return records && mode != cudaStreamCaptureModeRelaxed; }

cudaError_t wait(const char* what) {
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported, what);
  ++waits;
  return cudaSuccess;
}

bool is_recording(cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex);
  return recording.count(stream) != 0;
}

// Takes bytes of the capacity; whether there were as many.
bool take(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  if (used + bytes > capacity()) return false;
  used += bytes;
  return true;
}

void* reserve(size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

bool lies_in(const std::map<uintptr_t, size_t>& memory, const void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  const auto after = memory.upper_bound(at);
  return after != memory.begin() && at < std::prev(after)->first + std::prev(after)->second;
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
  if (bytes <= kTouched || !lies_in(device_memory, to)) memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t launch(dim3 grid, dim3 block) {
  ++launches;
  const bool fits = grid.x && grid.y && grid.z && grid.y < 65536 && grid.z < 65536 && block.x * block.y * block.z <= 1024;
  return fits ? cudaSuccess : fail(cudaErrorInvalidConfiguration);
}

thread_local struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configuration;

int attribute(int which) {  // of an H200, where it matters
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrL2CacheSize: return 60 << 20;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    default: return 1;
  }
}

// What an allocator of growing blocks asks the driver for: addresses, memory, and one at the other.
int granularity(size_t* bytes, const void*, int) { return *bytes = kPage, 0; }
int reserve_addresses(uintptr_t* start, size_t bytes, size_t, uintptr_t, unsigned long long) {
  void* const found = reserve(bytes);
  return found == MAP_FAILED ? kOutOfMemory : (*start = reinterpret_cast<uintptr_t>(found), 0);
}
int free_addresses(uintptr_t start, size_t bytes) { return munmap(reinterpret_cast<void*>(start), bytes); }
int create_memory(uintptr_t* handle, size_t bytes, const void*, unsigned long long) {
  if (getenv("NULL_GPU_WITHOUT_MAPPING")) return kNotSupported;
  return take(bytes) ? (*handle = bytes, 0) : kOutOfMemory;
}
int release_memory(uintptr_t handle) {
  std::lock_guard<std::mutex> lock(mutex);
  return used -= handle, 0;
}
int map_memory(uintptr_t start, size_t bytes, size_t, uintptr_t, unsigned long long) {
  std::lock_guard<std::mutex> lock(mutex);
  return device_memory[start] = bytes, 0;
}
int unmap_memory(uintptr_t start, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  madvise(reinterpret_cast<void*>(start), bytes, MADV_DONTNEED);
  device_memory.erase(device_memory.lower_bound(start), device_memory.lower_bound(start + bytes));
  return 0;
}
int succeed() { return 0; }

}  // namespace

extern "C" {

long null_gpu_launches() { return launches; }
long null_gpu_waits() { return waits; }
long null_gpu_replays() { return replays; }

// --- runtime: memory ---

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported, "cudaMalloc");
  bytes = (bytes + kPage - 1) / kPage * kPage;
  if (!take(bytes)) return fail(cudaErrorMemoryAllocation);
  *pointer = reserve(bytes);
  std::lock_guard<std::mutex> lock(mutex);
  device_memory[reinterpret_cast<uintptr_t>(*pointer)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  if (!pointer) return cudaSuccess;
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported, "cudaFree");
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = device_memory.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == device_memory.end()) return fail(cudaErrorInvalidValue);
  munmap(pointer, found->second);
  used -= found->second;
  device_memory.erase(found);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported, "cudaHostAlloc");
  *pointer = malloc(bytes);
  std::lock_guard<std::mutex> lock(mutex);
  pinned_memory[reinterpret_cast<uintptr_t>(*pointer)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  pinned_memory.erase(reinterpret_cast<uintptr_t>(pointer));
  free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  std::lock_guard<std::mutex> lock(mutex);
  *total = capacity();
  *free_bytes = *total - used;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  *found = {};
  found->type = lies_in(device_memory, pointer) ? cudaMemoryTypeDevice
      : lies_in(pinned_memory, pointer)         ? cudaMemoryTypeHost
                                                : cudaMemoryTypeUnregistered;
  found->devicePointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const cudaError_t error = wait("cudaMemcpy");
  return error ? error : copy(to, from, bytes);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  for (const void* pointer : {const_cast<const void*>(to), from}) {
    const bool is_pageable = !lies_in(device_memory, pointer) && !lies_in(pinned_memory, pointer);
    if (is_pageable && is_recording(stream)) return fail(cudaErrorStreamCaptureUnsupported, "pageable copy");
  }
  return copy(to, from, bytes);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes <= kTouched) memset(to, value, bytes);
  return cudaSuccess;
}

// --- runtime: device, streams, events ---

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? fail(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) { return *value = attribute(which), cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  *found = {};
  strcpy(found->name, "null GPU");
  found->totalGlobalMem = capacity();
  found->major = 9;
  found->warpSize = attribute(cudaDevAttrWarpSize);
  found->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  found->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  found->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  found->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  found->maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX);
  found->maxGridSize[1] = found->maxGridSize[2] = attribute(cudaDevAttrMaxGridDimY);
  found->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  found->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  found->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  found->regsPerBlock = found->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  found->textureAlignment = 512;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return wait("cudaDeviceSynchronize"); }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return *stream = static_cast<cudaStream_t>(malloc(1)), cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) {
  return is_forbidden() ? fail(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery") : cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (is_recording(stream)) return fail(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize");
  return wait("cudaStreamSynchronize");
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete reinterpret_cast<Event*>(event), cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *reinterpret_cast<Event*>(event) = {now.tv_sec * 1e3 + now.tv_nsec / 1e6, is_recording(stream)};
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = reinterpret_cast<Event*>(end)->milliseconds - reinterpret_cast<Event*>(start)->milliseconds;
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (reinterpret_cast<Event*>(event)->is_recorded) return fail(cudaErrorCapturedEvent);
  return is_forbidden() ? fail(cudaErrorStreamCaptureUnsupported, "cudaEventQuery") : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (reinterpret_cast<Event*>(event)->is_recorded) return fail(cudaErrorCapturedEvent);
  return wait("cudaEventSynchronize");
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  std::lock_guard<std::mutex> lock(mutex);
  if (reinterpret_cast<Event*>(event)->is_recorded && !recording.empty()) recording.insert(stream);
  return cudaSuccess;
}

// --- runtime: recording ---

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode asked) {
  if (!stream) return fail(cudaErrorStreamCaptureUnsupported, "the default stream");
  std::lock_guard<std::mutex> lock(mutex);
  recording.insert(stream);
  records = true;
  mode = asked;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  std::lock_guard<std::mutex> lock(mutex);
  recording.clear();
  records = false;
  mode = cudaStreamCaptureModeGlobal;
  *graph = static_cast<cudaGraph_t>(malloc(1));
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = is_recording(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges, size_t* count) {
  if (id) *id = 1;
  if (graph) *graph = nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) { return std::swap(*other, mode), cudaSuccess; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t, unsigned long long) {
  return *made = static_cast<cudaGraphExec_t>(malloc(1)), cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return ++replays, cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return free(graph), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return free(graph), cudaSuccess; }

// --- runtime: kernels and errors ---

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  *found = {};
  found->maxThreadsPerBlock = 1024;
  found->ptxVersion = found->binaryVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 4, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void**, size_t, cudaStream_t) { return launch(grid, block); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void**, size_t, cudaStream_t) { return launch(grid, block); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void*, void**) { return launch(how->gridDim, how->blockDim); }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(calloc(1, 64)); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }
const char* cudaGetErrorName(cudaError_t) { return "an error of the null GPU"; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "forbidden by the null GPU";
}
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

// --- driver ---

int cuGetErrorString(int, const char** text) { return *text = "an error of the null GPU", 0; }
cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  static const std::map<std::string, void*> known = {
      {"cuMemGetAllocationGranularity", reinterpret_cast<void*>(granularity)},
      {"cuMemAddressReserve", reinterpret_cast<void*>(reserve_addresses)},
      {"cuMemAddressFree", reinterpret_cast<void*>(free_addresses)},
      {"cuMemCreate", reinterpret_cast<void*>(create_memory)},
      {"cuMemRelease", reinterpret_cast<void*>(release_memory)},
      {"cuMemMap", reinterpret_cast<void*>(map_memory)},
      {"cuMemUnmap", reinterpret_cast<void*>(unmap_memory)},
      {"cuGetErrorString", reinterpret_cast<void*>(cuGetErrorString)},
  };
  const auto found = known.find(name);
  *function = found == known.end() ? reinterpret_cast<void*>(succeed) : found->second;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int number) { return *device = number, 0; }
int cuDeviceGetAttribute(int* value, int which, int) { return *value = attribute(which), 0; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* is_active) { return *flags = 0, *is_active = 1, 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &launches, 0; }
int cuCtxGetCurrent(void** context) { return *context = &launches, 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxGetLimit(size_t* value, int) { return *value = 0, 0; }
int cuCtxSetLimit(int, size_t) { return 0; }
int cuFuncGetAttribute(int* value, int which, void*) { return *value = which == 0 ? 1024 : 0, 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuFuncSetCacheConfig(void*, int) { return 0; }
int cuModuleLoad(void** module, const char*) { return *module = malloc(1), 0; }
int cuModuleLoadData(void** module, const void*) { return *module = malloc(1), 0; }
int cuModuleLoadDataEx(void** module, const void*, unsigned, void*, void*) { return *module = malloc(1), 0; }
int cuModuleGetFunction(void** function, void*, const char*) { return *function = malloc(1), 0; }
int cuModuleUnload(void*) { return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) { return *blocks = 4, 0; }
int cuOccupancyMaxActiveClusters(int* clusters, void*, void*) { return *clusters = 4, 0; }
int cuPointerGetAttribute(void* value, int which, uintptr_t pointer) {
  constexpr int kDevicePointer = 3;
  return which == kDevicePointer ? (*static_cast<uintptr_t*>(value) = pointer, 0) : (*static_cast<int*>(value) = 2, 0);
}
int cuLaunchKernelEx(const unsigned* how, void*, void**, void**) {
  return launch({how[0], how[1], how[2]}, {how[3], how[4], how[5]});
}
int cuLaunchKernel(
    void*, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y, unsigned block_z, unsigned, void*,
    void**, void**) {
  return launch({x, y, z}, {block_x, block_y, block_z});
}
int cuLaunchCooperativeKernel(
    void*, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y, unsigned block_z, unsigned, void*,
    void**) {
  return launch({x, y, z}, {block_x, block_y, block_z});
}
int cuTensorMapEncodeTiled() { return 0; }
int cuLinkCreate_v2() { return 0; }
int cuLinkAddData_v2() { return 0; }
int cuLinkComplete() { return 0; }

// --- cuBLAS ---

int cublasCreate_v2(void** handle) { return *handle = malloc(1), 0; }
int cublasDestroy_v2(void* handle) { return free(handle), 0; }
int cublasGetMathMode(void*, int* value) { return *value = 0, 0; }
int cublasSetMathMode() { return 0; }
int cublasGetPointerMode_v2(void*, int* value) { return *value = 0, 0; }
int cublasSetPointerMode_v2() { return 0; }
int cublasSetStream_v2() { return 0; }
int cublasSetWorkspace_v2() { return 0; }
int cublasGemmEx() { return ++launches, 0; }
int cublasGemmStridedBatchedEx() { return ++launches, 0; }
int cublasSgemm_v2() { return ++launches, 0; }
int cublasSgemmStridedBatched() { return ++launches, 0; }
int cublasSgemv_v2() { return ++launches, 0; }
int cublasSdot_v2() { return ++launches, 0; }
int cublasLtMatmul() { return ++launches, 0; }
size_t cublasLtGetVersion() { return 130000; }
int cublasLtMatmulDescCreate(void** made, int, int) { return *made = malloc(1), 0; }
int cublasLtMatmulDescSetAttribute() { return 0; }
int cublasLtMatmulDescDestroy(void* made) { return free(made), 0; }
int cublasLtMatmulPreferenceCreate(void** made) { return *made = malloc(1), 0; }
int cublasLtMatmulPreferenceSetAttribute() { return 0; }
int cublasLtMatmulPreferenceDestroy(void* made) { return free(made), 0; }
int cublasLtMatrixLayoutCreate(void** made, int, uint64_t, uint64_t, int64_t) { return *made = malloc(1), 0; }
int cublasLtMatrixLayoutSetAttribute() { return 0; }
int cublasLtMatrixLayoutDestroy(void* made) { return free(made), 0; }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* found) {
  return *found = 1, 0;
}

}  // extern "C"
