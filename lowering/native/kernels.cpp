// Kernels written once for vectors of any length, for each kind of processor.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "lawcat.h"
#include "layers.h"

using namespace lawcat;

namespace four {
#define TARGET
#define LANES 4
#define ROWS 4
#define COLUMNS 2
#include "for_processor.h"
}  // namespace four

#if defined(__x86_64__)
namespace eight {
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 6
#define COLUMNS 2
#include "for_processor.h"
}  // namespace eight

namespace sixteen {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define LANES 16
#define ROWS 5
#define COLUMNS 5
#include "for_processor.h"
}  // namespace sixteen
#endif

namespace lawcat {
const Kernels portable{four::project, four::head};
#if defined(__x86_64__)
const Kernels avx2{eight::project, eight::head};
const Kernels avx512{sixteen::project, sixteen::head};
#endif
}  // namespace lawcat

namespace layers {
const Kernels portable{four::norm, four::swiglu};
#if defined(__x86_64__)
const Kernels avx2{eight::norm, eight::swiglu};
const Kernels avx512{sixteen::norm, sixteen::swiglu};
#endif
}  // namespace layers
