#include "cuda/launch.cuh"
#include "cuda/whiten.cuh"

namespace ppo {
namespace {

WhitenInputs whiten_inputs(const Tensor& x, const OptTensor& mask) {
  WhitenInputs in{{nullptr, 1, x.numel(), x.numel(), 0.0},
                  {contiguous_data<float>("x", x, x)},
                  {contiguous_data<uint8_t>("mask", mask, x)},
                  false};
  in.aligned = flat_and_aligned(in.rows, in.x, in.mask);
  return in;
}

int64_t whiten_blocks(const Tensor& x) { return std::min(whiten_chunks(x.numel()), kWhitenBlocks); }

// Count, mean and squared deviations of the valid tokens, and the partials they are folded from, which have to last as
// long as that launch. `followed`: a dependent launch comes next.
std::array<Tensor, 4> launch_moments(const Launcher& launch, const WhitenInputs& in, const Tensor& x, bool followed) {
  const int64_t blocks = std::max<int64_t>(whiten_blocks(x), 1);
  const auto doubles = [&](Sizes sizes) { return empty(sizes, ScalarType::Double, x); };
  std::array<Tensor, 4> found{doubles({}), doubles({}), doubles({}), doubles({WhitenPartials::kCount * blocks})};
  double* const to[] = {data_of<double>(found[0]), data_of<double>(found[1]), data_of<double>(found[2]),
                        data_of<double>(found[3])};
  launch(moments_kernel, blocks, kWhitenThreads, in, to[3]);
  launch.dependent(moments_fold_kernel, 1, kFoldThreads, to[3], blocks, followed, to[0], to[1], to[2]);
  return found;
}

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const OptTensor& mask) {
  PPO_COUNT("moments");
  const auto found = launch_moments(Launcher(x), whiten_inputs(x, mask), x, false);
  return std::make_tuple(found[0], found[1], found[2]);
}

Tensor whiten(const Tensor& x, const OptTensor& mask, const OptTensor& count, const OptTensor& mean,
              const OptTensor& m2, bool shift_mean, bool unbiased, double eps) {
  PPO_COUNT("whiten");
  const Launcher launch(x);
  const WhitenInputs in = whiten_inputs(x, mask);
  const Tensor y = empty(x.sizes(), ScalarType::Float, x);
  check_together(count, mean, m2);
  const RowVector<double> given[] = {{"count", count, {}}, {"mean", mean, {}}, {"m2", m2, {}}};
  const WhitenOptions options{shift_mean, unbiased, eps};
  auto* out = data_of<float>(y);
  const int64_t blocks = whiten_blocks(x);
  if (blocks == 0) return y;
  if (count.has_value()) {
    launch(whiten_kernel, blocks, kWhitenThreads, in, given[0].data(), given[1].data(), given[2].data(), options, out);
  } else {
    const auto found = launch_moments(launch, in, x, true);
    const auto own = [&](int i) { return data_of<const double>(found[i]); };
    launch.dependent(whiten_kernel, blocks, kWhitenThreads, in, own(0), own(1), own(2), options, out);
  }
  return y;
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m) {
  PPO_IMPL(m, "moments", ppo::moments);
  PPO_IMPL(m, "whiten", ppo::whiten);
}
