"""The same as pai-bench sketching, from a checkout."""

from pai_bench.commands.sketching import main

if __name__ == "__main__":
    main()
