QUICK = "--xla_backend_optimization_level=0"  # in tests compiling takes longer than running
