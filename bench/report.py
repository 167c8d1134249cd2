def overview(results): return str(len(results["benchmarks"]))
