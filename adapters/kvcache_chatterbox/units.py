"""What speech tokens, mel frames and samples are to one another in Chatterbox."""

SAMPLE_RATE = 24_000  # of the audio, samples a second
TOKENS_PER_SECOND = 25  # of speech
FRAMES_PER_TOKEN = 2
SAMPLES_PER_TOKEN = 960
SAMPLES_PER_FRAME = 480
MELS = 80  # channels of a frame
SPEECH_TOKENS = 6561  # ids from here on are start and stop, not speech
