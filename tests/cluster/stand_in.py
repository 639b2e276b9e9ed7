"""Model servers that have nothing but metrics, one for each address, in one process: stand_in.py PORT ADDRESS…"""
import asyncio
import sys

PAGE = b"vllm:num_requests_waiting 0\nvllm:num_requests_running 0\nvllm:kv_cache_usage_perc 0\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n%s" % (len(PAGE), PAGE)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
    try:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(ANSWER)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main(port: int, addresses: list[str]):
    server = await asyncio.start_server(answer, addresses, port)
    print("ready", flush=True)
    await server.serve_forever()


asyncio.run(main(int(sys.argv[1]), sys.argv[2:]))
