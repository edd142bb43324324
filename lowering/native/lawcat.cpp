// The kernel of a LAWCAT site for each kind of vector; plain C++ takes those that every processor has.
#include "lawcat.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace lawcat {

constexpr int64_t kBlock = 32, kQueries = 16;

namespace four {
#define TARGET
#define LANES 4
#define ROWS 4
#define COLUMNS 2
namespace {
#include "lawcat_kernel.h"
}
#undef TARGET
#undef LANES
#undef ROWS
#undef COLUMNS
}  // namespace four

const Kernels portable{four::project, four::head};

#if defined(__x86_64__)
namespace eight {
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 6
#define COLUMNS 2
namespace {
#include "lawcat_kernel.h"
}
#undef TARGET
#undef LANES
#undef ROWS
#undef COLUMNS
}  // namespace eight

namespace sixteen {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define LANES 16
#define ROWS 5
#define COLUMNS 5
namespace {
#include "lawcat_kernel.h"
}
#undef TARGET
#undef LANES
#undef ROWS
#undef COLUMNS
}  // namespace sixteen

const Kernels avx2{eight::project, eight::head};
const Kernels avx512{sixteen::project, sixteen::head};
#endif

}  // namespace lawcat
