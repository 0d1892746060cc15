"""Speech tokens as audio: chunks, joints, the watermark."""
