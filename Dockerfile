# For GPU machines. NVIDIA's container brings torch, Transformer Engine, flash-attn and apex built for each other, so
# torch is taken from there and not installed again. Not built by the test suite.
FROM nvcr.io/nvidia/pytorch:26.08-py3

WORKDIR /opt/nemo_vlm
COPY requirements requirements
RUN grep -v "^torch==" requirements/base.txt > /tmp/base.txt && pip install --no-cache-dir -r /tmp/base.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .

CMD ["bash"]
