// SPDX-License-Identifier: Apache-2.0
//
// The kernels of dispatch and combine, compiled for a CPU. Under a namespace of their own: the library has some of the
// same inline functions, which there spin in another way, and the linker would keep one of the two.
#include "kernels.h"

#include "machine.h"

#define ept ept_on_fibers
#define EPT_SPIN() ::simt::yield()
#define EPT_CLOCK_AHEAD() ::simt::ahead.load(std::memory_order_relaxed)
#define EPT_GPU_INITIATED  // library.h is its device library
#define EPT_RELEASES() ::simt::release()
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // load and store stand under the same condition
#endif
#include "moe/cuda/moe.cu"

namespace {

template <class Argument, void (*kernel)(Argument)>
simt::Kernel made() {
  return {[](const void *argument) { kernel(*static_cast<const Argument *>(argument)); }, sizeof(Argument)};
}

}  // namespace

using namespace ept::moe::cuda;
const simt::Kernel simt::kernels[15] = {
    made<DispatchSend, moe_dispatch_send>(),
    made<DispatchWait, moe_dispatch_wait>(),
    made<DispatchRecv, moe_dispatch_recv>(),
    made<DispatchRecv, moe_dispatch_claims>(),
    made<CombineSend, moe_combine_send>(),
    made<CombineRecv, moe_combine_recv>(),
    made<Drain, moe_drain>(),
    made<TakeMembers, moe_take_members>(),
    made<LateSend, moe_late_send>(),
    made<LateRecv, moe_late_recv>(),
    made<Drain, moe_quiet>(),
    made<TrialArgs, moe_trial>(),
    made<StreamedDispatch, moe_streamed_dispatch>(),
    made<StreamedLate, moe_streamed_late>(),
    made<StreamedCombine, moe_streamed_combine>(),
};
