// All kernels for one kind of processor; kernels.cpp includes this once for each, with TARGET, LANES, ROWS and COLUMNS
// defined, and finds them undefined afterwards.
namespace {
#include "vectors.h"

#include "lawcat_kernel.h"
#include "layers_kernel.h"
}  // namespace
#undef INLINE
#undef MOVED
#undef FOLDED
#undef TARGET
#undef LANES
#undef ROWS
#undef COLUMNS
