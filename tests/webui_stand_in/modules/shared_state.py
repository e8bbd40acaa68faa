"""modules.shared_state: how far the WebUI is, and what the user has pressed."""


class State:
    skipped = interrupted = stopping_generation = processing_has_refined_job_count = False
    job_no = sampling_step = sampling_steps = current_image_sampling_step = 0
    job_count = -1
    current_latent = textinfo = None

    def __init__(self):
        self.begin()

    def begin(self, job="(unknown)"):
        self.__dict__.clear()

    def nextjob(self):
        self.job_no += 1
        self.sampling_step = self.current_image_sampling_step = 0

    def interrupt(self):
        self.interrupted = True

    def skip(self):
        self.skipped = True
