"""The same as pai-bench throughput, from a checkout."""

from pai_bench.commands.throughput import main

if __name__ == "__main__":
    main()
