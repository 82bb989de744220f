"""The same as run.py: python -m pai_bench pruner=synflow sparsity=0.98."""

from pai_bench.launch.cli import main

main()
