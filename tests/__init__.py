# In tests compiling takes longer than running: the least optimization, and the older of XLA's two
# ways to write fusions, which compiles a train step in a third of the time. Users get neither.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
