// Facts fixed when the binary was made. build_info.py writes the definitions at each build.
#pragma once

namespace ppo {

struct BuildFact {
  const char* name;
  const char* value;  // "" means none
};
extern const BuildFact kBuildFacts[];
extern const int kNumBuildFacts;

}  // namespace ppo
