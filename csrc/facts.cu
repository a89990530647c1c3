// What the library was built for.
#include "params.h"
#include "ptx.h"

namespace deco {

#ifdef __CUDACC__
std::vector<int> arch_list() {
  std::vector<int> archs = {__CUDA_ARCH_LIST__};  // 900 for 9.0
  for (int& arch : archs) arch /= 10;
  return archs;
}
int cuda_version() { return CUDART_VERSION; }
#else
std::vector<int> arch_list() { return {}; }
int cuda_version() { return 0; }
#endif

}  // namespace deco
