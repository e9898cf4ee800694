from importlib.metadata import version

# jaxlib 0.11 no longer has the older of XLA's two ways to write fusions, and an XLA flag that it
# does not know ends the process.
OLDER_FUSIONS = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)

# In tests compiling takes longer than running: the least optimization; the older way to write
# fusions, which compiles a train step in a third of the time; and one module of code, not many
# small ones. Users get none of it.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * OLDER_FUSIONS
)
