# Runs at every build (cmake -P): fills in build_info.cpp, and leaves it untouched when nothing changed.
# The hash is computed again by ppo_kernels/_native.py, which must walk the same files in the same order.
file(GLOB_RECURSE sources RELATIVE ${SOURCE_DIR} ${SOURCE_DIR}/csrc/*)
list(FILTER sources INCLUDE REGEX "\\.(cpp|cu|cuh|h|in|cmake)$")
list(FILTER sources EXCLUDE REGEX "(^|/)\\.[^/]*$")
list(APPEND sources CMakeLists.txt)
list(SORT sources COMPARE STRING)
set(listing "")
foreach(source IN LISTS sources)
  file(SHA256 ${SOURCE_DIR}/${source} digest)
  string(APPEND listing "${source} ${digest}\n")
endforeach()
string(SHA256 SOURCE_HASH "${listing}")

execute_process(COMMAND git -C ${SOURCE_DIR} rev-parse --short=12 HEAD
                OUTPUT_VARIABLE GIT_COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed OR NOT EXISTS ${SOURCE_DIR}/.git)
  set(GIT_COMMIT "")
endif()

configure_file(${SOURCE_DIR}/csrc/build_info.cpp.in ${OUTPUT} @ONLY)
