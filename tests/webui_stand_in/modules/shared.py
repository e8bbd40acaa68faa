"""modules.shared: settings, command line and progress."""

from types import SimpleNamespace

from modules import options, paths, shared_state, shared_total_tqdm  # noqa: F401 - the paths are there when others come

opts: options.Options = options.Options({}, set())
cmd_opts = SimpleNamespace(controlnet_dir=None)
state: shared_state.State = shared_state.State()
total_tqdm: shared_total_tqdm.TotalTQDM = shared_total_tqdm.TotalTQDM()
