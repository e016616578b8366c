from tests.model_files import make_run as make_run
