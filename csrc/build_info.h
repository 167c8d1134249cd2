// Facts fixed when the binary was made. The definitions come from build_info.cpp.in, filled in at each build.
#pragma once

namespace ppo {

struct BuildFact {
  const char* name;
  const char* value;  // "" means none
};
extern const BuildFact kBuildFacts[];
extern const int kNumBuildFacts;

}  // namespace ppo
