CLEANED: list[int] = []


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    import vllm

    CLEANED.append(len(vllm.ALIVE))
