"""modules.extra_networks: LoRAs and the like, of which there are none."""


def activate(p, extra_network_data):
    if p.scripts is not None:
        p.scripts.after_extra_networks_activate(p, batch_number=p.iteration, prompts=p.prompts, seeds=p.seeds,
                                                subseeds=p.subseeds, extra_network_data=extra_network_data)
